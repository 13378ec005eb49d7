"""The L1 term over a run: warm-up, both solvers, the controller, what is logged, and that a resumed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_train_l1 import dense_deltas
from test_train_penalised import SGD, dpo_trainer, sft_trainer
from trainkit import distance, factors, parts, sft_rows, start_away_from_zero

from paft.errors import UsageError
from paft.recipe import DpoRecipe, SftRecipe
from paft.train.callbacks import collapsing, note
from paft.train.options import check_penalty
from paft.train.stage import train

ADAM = {"per_device_train_batch_size": 8, "learning_rate": 5e-3, "warmup_steps": 0, "logging_steps": 1}


def records(trainer: Any) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("solver", ["subgradient", "proximal"])
@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (0.4, 2), (0, 0)])
def test_warm_up_raises_lambda_in_equal_steps(solver: str, warmup: float, steps: int, tiny_base: Path, tmp_path: Path) -> None:
    trainer = sft_trainer(tiny_base, tmp_path, l1=1e-3, l1_solver=solver, l1_warmup=warmup, trainer={**ADAM, "max_steps": 5})
    trainer.train()
    wanted = [1e-3 * min(1.0, step / steps) if steps else 1e-3 for step in range(5)]
    assert [record["l1_lambda"] for record in records(trainer)] == pytest.approx(wanted)


def test_the_loss_has_the_lambda_of_its_step(tiny_base: Path, tmp_path: Path) -> None:
    trainer = start_away_from_zero(sft_trainer(tiny_base, tmp_path, l1=1e-2, l1_warmup=3, trainer={**ADAM, "max_steps": 5}))
    trainer.train()
    for record in records(trainer):
        assert record["loss"] == pytest.approx(record["task_loss"] + record["l1_lambda"] * record["l1"], rel=1e-4)


@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
@pytest.mark.parametrize("clip", [0.0, 1e-2])
def test_the_relative_lambda_sees_the_task_alone(make: Any, clip: float, tiny_base: Path, tmp_path: Path) -> None:
    """Neither the penalty in the gradient, nor clipping, nor accumulation changes the estimate of the entry gradient."""
    def unit(l1: float, **options: Any) -> float:
        trainer = start_away_from_zero(make(tiny_base, tmp_path, l1=l1, trainer={**ADAM, "max_steps": 1, **options}))
        trainer.train()
        return l1 / records(trainer)[0]["l1_relative"]

    free = unit(1e-9, max_grad_norm=0.0)
    assert unit(1.0, max_grad_norm=clip) == pytest.approx(free, rel=1e-3)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert unit(1e-2, max_grad_norm=clip, **parts) == pytest.approx(free, rel=1e-3)


@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
def test_the_proximal_step_does_not_depend_on_the_accumulation(make: Any, tiny_base: Path, tmp_path: Path) -> None:
    def after(batch: int, accumulation: int) -> dict[str, Any]:
        options = {**SGD, "max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = start_away_from_zero(make(tiny_base, tmp_path, l1=1e-3, l1_solver="proximal", trainer=options))
        trainer.train()
        return factors(trainer)

    whole, parts = after(8, 1), after(1, 8)
    assert distance(whole, parts) < 1e-6
    assert any((tensor == 0).any() for tensor in whole.values())


def warned(err: str) -> bool:
    return "collapsing to zero" in err


@pytest.mark.parametrize(("fields", "rate", "collapses"), [
    ({"l1": 10.0}, 5e-3, True),
    ({"l1": 10.0, "l1_solver": "proximal"}, 5e-3, True),
    ({"l1_solver": "proximal", "l1_target_sparsity": 0.9}, 5e-3, False),
    ({"l1_target_sparsity": 0.9}, 5e-3, False),
    ({"l1": 1e-9}, 1e-9, False),  # 100 % of δ is below 1e-5, but for its learning rate
])
def test_a_collapse_is_told_from_sparsity(
    fields: dict[str, Any], rate: float, collapses: bool, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = SftRecipe(model=str(tiny_base), lora={"r": 3, "alpha": 6}, **fields,
                       trainer={**ADAM, "learning_rate": rate, "max_steps": 40, "logging_steps": 4})
    metrics = train(recipe, tmp_path / "out", rows={"train": sft_rows(8), "eval": []})["metrics"]
    told = capsys.readouterr().err
    assert warned(told) == collapses and told.count("warning") == collapses
    assert all(len(line) <= 80 for line in told.splitlines())
    assert metrics["share_below_1e-5"] > 0.6  # so the share alone would not tell


def test_the_manifest_has_the_adapter_as_it_ended(tiny_base: Path, tmp_path: Path) -> None:
    """Not a mean over the last logging window."""
    recipe = SftRecipe(model=str(tiny_base), lora={"r": 3, "alpha": 6}, l1=1e-3, l1_solver="proximal",
                       trainer={**ADAM, "max_steps": 7, "logging_steps": 5})
    metrics = train(recipe, tmp_path / "out", rows={"train": sft_rows(8), "eval": []}, quiet=True)["metrics"]
    model = PeftModel.from_pretrained(parts(tiny_base)[0], tmp_path / "out")
    delta = torch.cat([each.flatten() for each in dense_deltas(model)]).detach()
    assert metrics["l1"] == pytest.approx(delta.abs().sum().item(), rel=1e-4)
    assert metrics["share_zero"] == pytest.approx((delta == 0).double().mean().item(), abs=1e-5)
    assert metrics["l1_lambda"] == 1e-3
    assert json.loads((tmp_path / "out" / "paft.json").read_text())["metrics"] == metrics


def test_the_progress_note_fits_beside_a_bar(tmp_path: Path) -> None:
    logs = {"loss": 1.0, "task_loss": 0.4123, "l1": 123456.7, "share_below_1e-5": 0.914}
    assert note(logs) == "loss 0.412  L1 1.23e+05  91% <1e-5"
    assert note({**logs, "share_zero": 0.9}) == "loss 0.412  L1 1.23e+05  90% zero"
    assert note({"loss": 1.0}) == "loss 1.000"


def test_only_small_and_not_grown_is_a_collapse() -> None:
    assert collapsing({"share_below_1e-5": 0.99, "l1_reach": 0.01})
    assert not collapsing({"share_below_1e-5": 0.99, "l1_reach": 0.5})
    assert not collapsing({"share_below_1e-5": 0.3, "l1_reach": 0.01})


@pytest.mark.parametrize("kind", [SftRecipe, DpoRecipe])
def test_keys_that_contradict_each_other_are_refused(kind: Any) -> None:
    with pytest.raises(UsageError, match="l1_target_sparsity"):
        check_penalty(kind(l1=1e-3, l1_target_sparsity=0.9))
    with pytest.raises(UsageError, match="adafactor"):
        check_penalty(kind(l1=1e-3, l1_solver="proximal", trainer={"optim": "adafactor"}))
    check_penalty(kind(l1=1e-3, trainer={"optim": "adafactor"}))
