"""A training that was killed and resumed is the training that was never killed: same bytes, same log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainkit import pref_rows, sft_rows
from transformers import TrainerCallback

from paft.adapter import CONFIG, WEIGHTS
from paft.recipe import DpoRecipe, SftRecipe
from paft.train import stage, work
from paft.train.stage import train

SFT_ROWS = {"train": sft_rows(22, answer=None), "eval": sft_rows(6, seed=9)}
PREF_ROWS = {"train": pref_rows(22), "eval": pref_rows(6, seed=9)}
# 22 rows, 2 x 2 a step: 6 steps an epoch, the last with one micro-batch of two rows only.
STEPS = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
         "save_steps": 2, "logging_steps": 3}
CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second",
         "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


class Killed(BaseException):
    """Not an error that anything catches."""


class At(TrainerCallback):
    """Calls ``act`` where step ``step`` would begin."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def killed() -> None:
    raise Killed


def die_at(step: int, act: Callable[[], None], patch: Callable[[Any, str, Any], None]) -> None:
    build = stage._build

    def dying(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(At(step, act))
        return trainer

    patch(stage, "_build", dying)


def recipe(base: Path, kind: Any = SftRecipe, **fields: Any) -> Any:
    trainer = {**STEPS, **fields.pop("trainer", {})}
    return kind(model=str(base), lora={"r": 3, "alpha": 6, "dropout": 0.2}, trainer=trainer, **fields)


def rows_of(made: Any) -> dict[str, Any]:
    return PREF_ROWS if isinstance(made, DpoRecipe) else SFT_ROWS


def records(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same(one: Path, two: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert records(one) == records(two)
    metrics = [json.loads((out / "paft.json").read_text())["metrics"] for out in (one, two)]
    assert metrics[0] == metrics[1]


CASES = {
    "sft, in the second epoch, between two lines of the log": (SftRecipe, {"l1": 1e-4, "trainer": {"max_steps": 11}}, 9),
    "sft, at the end of an epoch": (SftRecipe, {"trainer": {"save_steps": 6}}, 6),
    "sft, evaluated at the end of an epoch": (SftRecipe, {"trainer": {"save_steps": 3, "eval_strategy": "epoch"}}, 6),
    "dpo": (DpoRecipe, {"trainer": {"disable_dropout": False, "logging_steps": 5}}, 7),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_unbroken(case: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields, step = CASES[case]
    made = recipe(tiny_base, kind, **fields)
    train(made, tmp_path / "unbroken", rows=rows_of(made), quiet=True)
    with monkeypatch.context() as patch:
        die_at(step, killed, patch.setattr)
        with pytest.raises(Killed):
            train(made, tmp_path / "a", rows=rows_of(made), quiet=True)
    assert not (tmp_path / "a").exists()
    assert work.newest(tmp_path / "a.partial") is not None
    manifest = train(made, tmp_path / "a", rows=rows_of(made), resume=True, quiet=True)
    assert_same(tmp_path / "unbroken", tmp_path / "a")
    assert manifest["metrics"]["steps"] == (11 if "max_steps" in made.trainer else 12)
    assert {path.name for path in tmp_path.iterdir()} == {"unbroken", "a"}


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_train_resume as here
made = here.recipe(Path(sys.argv[1]), l1=1e-4)
here.die_at(9, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
here.train(made, Path(sys.argv[2]), rows=here.SFT_ROWS, quiet=True)
"""


def test_a_process_killed_twice(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 at step 9 of 12 in another process, an exception at step 11 in this one, then the end."""
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, str(tiny_base), str(tmp_path / "a")], env={**os.environ},
                          capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a.partial", ".a.partial"}
    assert {path.name for path in (tmp_path / "a.partial").glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    made = recipe(tiny_base, l1=1e-4)
    with monkeypatch.context() as patch:
        die_at(11, killed, patch.setattr)
        with pytest.raises(Killed):
            train(made, tmp_path / "a", rows=SFT_ROWS, resume=True, quiet=True)
    train(made, tmp_path / "a", rows=SFT_ROWS, resume=True, quiet=True)
    train(made, tmp_path / "unbroken", rows=SFT_ROWS, quiet=True)
    assert_same(tmp_path / "unbroken", tmp_path / "a")
