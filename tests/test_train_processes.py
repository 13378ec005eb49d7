"""Training on two processes, by DDP and by FSDP2, is that on one: decisions, losses, adapters, logs; also where it goes on.

Two processes run everything, gloo on the CPU, so that their start is paid for once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from trainkit import distance, pref_rows, saved, sft_rows

from paft.errors import MismatchError, UsageError
from paft.launch import environment
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe
from paft.train.callbacks import Watch
from paft.train.l1 import is_sharded
from paft.train.stage import train

LAYOUTS = ("ddp", "fsdp2")
# Four rows a step, and four held-out rows of equal length in two batches: `Trainer` weighs batches, not tokens.
OPTIONS = {"max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.2, "optim": "sgd", "warmup_steps": 0,
           "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "eval_strategy": "steps",
           "eval_steps": 2, "use_cpu": True}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}
SAVING = {**ADAM, "save_strategy": "steps", "save_steps": 2, "eval_on_start": True}
ROWS = {"train": sft_rows(12, answer=None), "eval": sft_rows(4, seed=9)}
PAIRS = {"train": pref_rows(16), "eval": pref_rows(4, seed=9)}
BOTH = {"sft": ROWS["train"], "pref": PAIRS["train"], "sft_eval": sft_rows(5, seed=8, answer=None),
        "pref_eval": pref_rows(5, seed=9)}
MAXRIGHT = {"method": "maxright", "sft_opt": 4.0, "dpo_opt": 0.55, "max_eval_steps": 2}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "subgradient": (SftRecipe, ROWS, {"l1": 1e-3}),
    "proximal": (SftRecipe, ROWS, {"l1": 1e-2, "l1_solver": "proximal", "trainer": {**ADAM, "max_grad_norm": 0.5}}),
    "dpo": (DpoRecipe, PAIRS, {}),
    "alright": (JointRecipe, BOTH, {"method": "alright", "l1": 1e-3}),
    "maxright": (JointRecipe, BOTH, MAXRIGHT),
}
CUT: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "sft-cut": (SftRecipe, ROWS, {"l1": 1e-3, "trainer": SAVING}),
    "maxright-cut": (JointRecipe, BOTH, {**MAXRIGHT, "trainer": SAVING}),
}


def recipe(base: str, name: str, world: int) -> tuple[Any, dict[str, Any]]:
    kind, rows, fields = {**CASES, **CUT}[name]
    size = {f"per_device_{split}_batch_size": count // world for split, count in (("train", 2), ("eval", 4))}
    options = {**OPTIONS, **size, **fields.get("trainer", {})}
    return kind(**{"model": base, "lora": {"r": 3, "alpha": 6}, **fields, "trainer": options}), rows


def on_two(base: str, out: Path) -> None:
    """What each of the two processes does."""
    for layout in LAYOUTS:
        with mock.patch.dict(os.environ, environment(layout)):
            for name in CASES:
                made, rows = recipe(base, name, 2)
                train(made, out / layout / name, rows=rows, quiet=True)
    with mock.patch.dict(os.environ, environment("fsdp2")):
        for name in CUT:
            made, rows = recipe(base, name, 2)
            with pytest.raises(KeyboardInterrupt), mock.patch.object(Watch, "on_step_end", _interrupt):
                train(made, out / "fsdp2" / name, rows=rows, quiet=True)
            train(made, out / "fsdp2" / name, rows=rows, resume=True, quiet=True)
        made, rows = recipe(base, "dpo", 2)
        asked = made.model_copy(update={"trainer": {**made.trainer, "precompute_ref_log_probs": True}})
        with pytest.raises(UsageError, match=r"precompute_ref_log_probs is not possible under FSDP"):
            train(asked, out / "refused", rows=rows, quiet=True)
        with pytest.raises(MismatchError, match="L1 term of full fine-tuning needs whole weights"):
            train(recipe(base, "subgradient", 2)[0].model_copy(update={"full": True}), out / "refused", rows=ROWS, quiet=True)


def _interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    assert any(map(is_sharded, kwargs["model"].parameters())), "accelerate has passed FSDP over, and this is DDP"
    if state.global_step == 3:
        raise KeyboardInterrupt


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# What TRL notes of a batch beside these is of one process, or a mean of batches of unequal size.
NAMES = ("step", "loss", "task_loss", "sft_loss", "dpo_loss", "l1", "share_below_1e-5", "share_zero", "grad_norm", "tokens",
         "eval_loss", "eval_sft_loss", "eval_dpo_loss", "eval_pref_accuracy", "eval_rewards/accuracies")


def numbers(out: Path) -> list[dict[str, float]]:
    return [{name: each[name] for name in NAMES if name in each} for each in records(out)]


@pytest.fixture(scope="module")
def two(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    script = out / "two.py"
    here = Path(__file__).parent
    script.write_text(f"import sys, pathlib\nsys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
                      f"import test_train_processes as here\nhere.on_two({str(tiny_base)!r}, pathlib.Path({str(out)!r}))\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "Error" in line]
    return out


@pytest.fixture(scope="module")
def one(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    for name in (*CASES, *CUT):
        made, rows = recipe(str(tiny_base), name, 1)
        train(made, out / name, rows=rows, quiet=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), [*((layout, name) for layout in LAYOUTS for name in CASES),
                                              *(("fsdp2", name) for name in CUT)])
def test_two_processes_train_as_one(layout: str, name: str, one: Path, two: Path) -> None:
    ours, theirs = one / name, two / layout / name
    assert distance(saved(ours), saved(theirs)) < 1e-6
    for record, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert [each.get("chosen") for each in records(ours)] == [each.get("chosen") for each in records(theirs)]
    assert {path.name for path in theirs.iterdir()} == {path.name for path in ours.iterdir()}


@pytest.mark.slow
def test_there_was_something_to_agree_on(one: Path, two: Path) -> None:
    assert set("".join(each.get("chosen", "") for each in records(one / "maxright"))) == {"D", "S"}
    assert max(each.get("share_zero", 0) for each in records(one / "proximal")) > 0
    assert {path.name for path in two.iterdir()} == {"two.py", *LAYOUTS}, "nothing is left of what was refused"
