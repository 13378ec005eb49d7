"""The penalty seam against TRL without it: nothing added at λ = 0, and added once per optimiser step otherwise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trainkit import distance, factors, identical, parts, pref_rows, sft_rows, start_away_from_zero
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from paft.data import dataset
from paft.errors import MismatchError
from paft.recipe import DpoRecipe, SftRecipe
from paft.train import preference, sft
from paft.train.l1 import penalty
from paft.train.options import lora_config, trainer_config

# Plain SGD at a constant rate: adapters then differ exactly as their gradients do.
SGD = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "learning_rate": 0.5,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
}
LORA = {"r": 3, "alpha": 6}


def sft_trainer(base: Path, scratch: Path, *, eval_rows: Any = (), rows: int = 16, answer: int | None = 3, **fields: Any) -> Any:
    recipe = SftRecipe(model=str(base), **{"lora": LORA, **fields})
    set_seed(recipe.seed)
    return sft.build(recipe, *parts(base), sft_rows(rows, answer=answer), list(eval_rows), str(scratch))


def dpo_trainer(base: Path, scratch: Path, *, eval_rows: Any = (), rows: int = 16, **fields: Any) -> Any:
    recipe = DpoRecipe(model=str(base), lora=LORA, **fields)
    set_seed(recipe.seed)
    return preference.build(recipe, *parts(base), pref_rows(rows), list(eval_rows), str(scratch))


MAKERS = pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_without_penalty_it_is_trl_to_the_bit(objective: str, tiny_base: Path, tmp_path: Path) -> None:
    make, kind, trainer_kind, rows, rate = {
        "sft": (sft_trainer, SFTConfig, SFTTrainer, sft_rows(16), 2e-4),
        "dpo": (dpo_trainer, DPOConfig, DPOTrainer, pref_rows(16), 5e-6),
    }[objective]
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4}
    ours = make(tiny_base, tmp_path, trainer=options)
    ours.train()
    set_seed(0)
    model, tokenizer = parts(tiny_base)
    args = trainer_config(kind, ours.recipe, str(tmp_path), learning_rate=rate)
    plain = trainer_kind(
        model=model, args=args, processing_class=tokenizer, train_dataset=dataset(rows), peft_config=lora_config(ours.recipe.lora)
    )
    before = factors(plain)
    plain.train()
    assert plain.state.global_step == 8
    assert not identical(before, factors(plain))
    assert identical(factors(ours), factors(plain))


@MAKERS
def test_the_penalty_is_added_once_per_step_whatever_the_accumulation(make: Any, tiny_base: Path, tmp_path: Path) -> None:
    def after(batch: int, accumulation: int) -> dict[str, Any]:
        trainer = start_away_from_zero(
            make(
                tiny_base,
                tmp_path,
                l1=1e-3,
                l2=1e-2,
                trainer={
                    **SGD,
                    "max_steps": 3,
                    "per_device_train_batch_size": batch,
                    "gradient_accumulation_steps": accumulation,
                },
            )
        )
        trainer.train()
        return factors(trainer)

    whole = after(8, 1)
    for batch, accumulation in ((4, 2), (1, 8)):
        # 1e-5 of it is for signs of products near zero, which flip with the last bit of a factor: rate * l1 * |s·A| each
        assert distance(whole, after(batch, accumulation)) < 2e-4


@MAKERS
@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_step_is_the_task_gradient_plus_the_penaltys(make: Any, accumulation: int, tiny_base: Path, tmp_path: Path) -> None:
    rate, options = (
        1e-3,
        {
            **SGD,
            "learning_rate": 1e-3,
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": accumulation,
        },
    )
    free = start_away_from_zero(make(tiny_base, tmp_path, trainer=options))
    start = factors(free)
    value, _ = penalty(free.model, l1=1.0, l2=0.5)
    names = list(start)
    parameters = dict(free.model.named_parameters())
    slope = dict(zip(names, torch.autograd.grad(value, [parameters[name] for name in names]), strict=True))
    free.train()
    bound = start_away_from_zero(make(tiny_base, tmp_path, l1=1.0, l2=0.5, trainer=options))
    assert identical(start, factors(bound))
    bound.train()
    assert distance(factors(bound), {name: tensor - rate * slope[name] for name, tensor in factors(free).items()}) < 1e-6


def test_a_partial_last_step_still_adds_the_penalty_once(tiny_base: Path, tmp_path: Path) -> None:
    """6 rows in batches of 2 with accumulation 2: the second step has one micro-batch only."""
    options = {
        **SGD,
        "learning_rate": 0.1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    trainer = start_away_from_zero(dpo_trainer(tiny_base, tmp_path, rows=6, l1=1e-3, trainer=options))
    trainer.train()
    records = [record for record in trainer.state.log_history if "l1" in record and "loss" in record]
    assert len(records) == 2
    for record in records:
        assert record["loss"] == pytest.approx(record["task_loss"] + 1e-3 * record["l1"], rel=1e-3)


@MAKERS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_log_tells_the_parts_apart(make: Any, accumulation: int, tiny_base: Path, tmp_path: Path) -> None:
    options = {**SGD, "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    trainer = start_away_from_zero(make(tiny_base, tmp_path, l1=1e-3, trainer=options))
    with torch.no_grad():
        norm = float(penalty(trainer.model, l1=1.0, l2=0.0)[1])
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["l1"] == pytest.approx(norm, rel=1e-6)
    assert first["loss"] == pytest.approx(first["task_loss"] + 1e-3 * norm, rel=1e-3)
    assert 0 <= first["share_below_1e-5"] < 0.01
    assert "share_below_1e-5" in trainer.state.log_history[-1]


@MAKERS
def test_eval_loss_is_the_task_alone(make: Any, tiny_base: Path, tmp_path: Path) -> None:
    held = (pref_rows if make is dpo_trainer else sft_rows)(8, seed=5)
    free, bound = (start_away_from_zero(make(tiny_base, tmp_path, eval_rows=held, l1=l1)) for l1 in (0.0, 1e3))
    assert free.evaluate()["eval_loss"] == bound.evaluate()["eval_loss"]


def test_a_strong_penalty_ends_with_a_smaller_delta(tiny_base: Path, tmp_path: Path) -> None:
    def norm(**fields: float) -> float:
        trainer = sft_trainer(tiny_base, tmp_path, trainer={"max_steps": 15, "learning_rate": 5e-3, "warmup_steps": 0}, **fields)
        trainer.train()
        return float(penalty(trainer.model, l1=1.0, l2=0.0)[1].detach())

    free = norm()
    assert norm(l1=1e-2) < 0.5 * free
    assert norm(l2=10.0) < 0.5 * free


def test_a_diverged_loss_stops_at_its_step(tiny_base: Path, tmp_path: Path) -> None:
    """Trainer's own log would show the mean of the finite losses instead, and train on."""
    trainer = sft_trainer(tiny_base, tmp_path, trainer={"max_steps": 9, "learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(MismatchError, match=r"loss is (nan|inf) at step 2") as caught:
        trainer.train()
    assert caught.value.exit_code == 3
    assert trainer.state.global_step == 1


def test_a_model_without_loss_arguments_is_divided_by_the_trainer(tiny_base: Path, tmp_path: Path) -> None:
    """``num_items_in_batch`` is then None and `Trainer` divides by the accumulation steps: penalty and log must follow."""
    options = {**SGD, "learning_rate": 1e-3, "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    counted, divided = (start_away_from_zero(sft_trainer(tiny_base, tmp_path, l1=1e-3, trainer=options)) for _ in range(2))
    divided.model_accepts_loss_kwargs = False
    counted.train()
    divided.train()
    assert distance(factors(counted), factors(divided)) < 1e-6
    one, other = counted.state.log_history[0], divided.state.log_history[0]
    assert one["task_loss"] == pytest.approx(other["task_loss"], rel=1e-5)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert math.isfinite(one["l1"])
