"""Ways to run the same training: on two processes, packed, with less memory. None changes what is learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_train_stage import SHORT, sft_recipe, write_rows
from trainkit import distance, saved, sft_rows

from paft.train.stage import train

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "paft"]
ROWS = {"train": sft_rows(12), "eval": []}


@pytest.mark.slow
def test_two_processes_train_one_adapter(tiny_base: Path, tmp_path: Path) -> None:
    """One output, one log, one result line; and what one process learns, here from the same four rows in every step."""
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(4, answer=None))
    options = {"max_steps": 3, "logging_steps": 1, "warmup_steps": 0, "learning_rate": 0.1, "optim": "sgd",
               "save_steps": 1}
    sets = [part for key, value in options.items() for part in ("--set", f"trainer.{key}={value}")]
    command = ["train-sft", "-m", str(tiny_base), "-d", data, "--l1", "1e-4", *sets]
    two = [*LAUNCH, *command, "--set", "trainer.per_device_train_batch_size=2", "-o", str(tmp_path / "two")]
    done = subprocess.run(two, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps") == 1
    one = [sys.executable, "-m", "paft", *command, "--set", "trainer.per_device_train_batch_size=4", "-o", str(tmp_path / "one")]
    assert subprocess.run(one, env={**os.environ}, capture_output=True, check=False).returncode == 0
    assert distance(saved(tmp_path / "one"), saved(tmp_path / "two")) < 1e-6
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "one", "two"}


def learned(base: Path, out: Path, **options: Any) -> dict[str, Any]:
    train(sft_recipe(base, trainer={**SHORT, "max_length": 128, **options}), out, rows=ROWS, quiet=True)
    return saved(out)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"activation_checkpointing": True}], ids=str)
def test_checkpointing_of_activations_changes_nothing(options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    assert distance(learned(tiny_base, tmp_path / "a"), learned(tiny_base, tmp_path / "b", **options)) < 1e-6


def test_packed_rows_do_not_see_each_other(tiny_base: Path, tmp_path: Path) -> None:
    """All twelve rows in one step, packed into one row or padded: the same tokens, the same gradient, without flash attention."""
    plain = learned(tiny_base, tmp_path / "a", per_device_train_batch_size=12)
    packed = learned(tiny_base, tmp_path / "b", packing=True)
    assert distance(plain, packed) < 1e-4
    wrapped = learned(tiny_base, tmp_path / "c", packing=True, packing_strategy="wrapped")
    assert distance(plain, wrapped) > 1e-3, "so the test can tell"


def test_wrapped_packing_is_told(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = sft_recipe(tiny_base, trainer={"packing": True, "packing_strategy": "wrapped", "max_steps": 1})
    train(recipe, tmp_path / "a", rows=ROWS)
    assert "lets them see each other" in capsys.readouterr().err
