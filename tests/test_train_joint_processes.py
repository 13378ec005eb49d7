"""Joint training on two processes is that on one: the same decisions, losses and adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_train_stage import write_rows
from trainkit import distance, pref_rows, saved, sft_rows

from paft.adapter import WEIGHTS
from paft.recipe import JointRecipe
from paft.train.stage import train

LORA = {"r": 3, "alpha": 6}
OPTIONS = {"max_steps": 8, "gradient_accumulation_steps": 2, "learning_rate": 0.2, "optim": "sgd", "warmup_steps": 0,
           "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "save_steps": 3, "eval_steps": 4,
           "use_cpu": True}
METHODS: dict[str, dict[str, Any]] = {
    "mix": {"l1": 1e-3}, "sequential": {}, "alright": {"l1": 1e-3},
    "maxright": {"sft_opt": 4.0, "dpo_opt": 0.55, "max_eval_steps": 3},
}


def recipe(base: str, data: dict[str, str], method: str, batch: int) -> JointRecipe:
    fields: dict[str, Any] = {**METHODS[method], **data, "trainer": {**OPTIONS, "per_device_train_batch_size": batch}}
    return JointRecipe(model=base, method=method, lora=LORA, **fields)  # type: ignore[arg-type]


def losses(out: Path) -> list[dict[str, float]]:
    """Per step what the records say of the task; the metrics of TRL beside them are of one process or cut."""
    names = ("sft_loss", "dpo_loss", "task_loss", "l1", "eval_loss", "eval_dpo_loss", "eval_sft_loss", "tokens")
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: each[name] for name in names if name in each} for each in found]


def decisions(out: Path) -> str:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return "".join(each.get("chosen", "") for each in found)


def all_of_them(base: str, data: dict[str, str], out: str) -> None:
    """What each of the two processes does."""
    for method in METHODS:
        train(recipe(base, data, method, 1), Path(out) / method, quiet=True)


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_base: Path, tmp_path: Path) -> None:
    data = {"sft_data": write_rows(tmp_path / "s.jsonl", sft_rows(12, answer=None)),
            "pref_data": write_rows(tmp_path / "p.jsonl", pref_rows(16)),
            "sft_eval_data": write_rows(tmp_path / "se.jsonl", sft_rows(5, seed=9)),
            "pref_eval_data": write_rows(tmp_path / "pe.jsonl", pref_rows(5, seed=9))}
    script = tmp_path / "two.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                      "import test_train_joint_processes as here\n"
                      f"here.all_of_them({str(tiny_base)!r}, {data!r}, {str(tmp_path / 'two')!r})\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for method in METHODS:
        one, two = tmp_path / "one" / method, tmp_path / "two" / method
        train(recipe(str(tiny_base), data, method, 2), one, quiet=True)
        assert decisions(one) == decisions(two)
        assert distance(saved(one), saved(two)) < 1e-5
        for ours, theirs in zip(losses(one), losses(two), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert (one / WEIGHTS).stat().st_size == (two / WEIGHTS).stat().st_size
    assert len(set(decisions(tmp_path / "one" / "maxright"))) == 2  # there was something to agree on
