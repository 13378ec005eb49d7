"""Joint training against its two halves: TRL's DPO and SFT trainers on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_train_penalised import LORA, SGD, dpo_trainer, sft_trainer
from torch import Tensor
from trainkit import distance, factors, identical, parts, pref_rows, sft_rows, start_away_from_zero
from transformers import set_seed

from paft.errors import MismatchError
from paft.recipe import JointRecipe
from paft.train import joint
from paft.train.l1 import penalty
from paft.train.optima import Optima
from paft.train.stage import train

STEP = {**SGD, "learning_rate": 0.1, "max_steps": 1, "per_device_train_batch_size": 8}


def joint_trainer(base: Path, scratch: Path, *, rows: int = 8, answer: int | None = 3, optima: Any = None, **fields: Any) -> Any:
    """On whole batches of ``rows``, so that a step of another trainer sees the same ones."""
    recipe = JointRecipe(model=str(base), lora=LORA, **fields)
    set_seed(recipe.seed)
    data = {"sft": sft_rows(rows, answer=answer), "pref": pref_rows(rows)}
    return joint.build(recipe, *parts(base), data, str(scratch), None, optima)


def moved(trainer: Any) -> dict[str, Tensor]:
    """How training moves the factors from a start where both have gradients."""
    before = factors(start_away_from_zero(trainer))
    trainer.train()
    return {name: tensor - before[name] for name, tensor in factors(trainer).items()}


@pytest.mark.parametrize("method", ["mix", "alright", "sequential"])
@pytest.mark.parametrize(("lam", "alone"), [(1.0, dpo_trainer), (0.0, sft_trainer)])
def test_one_objective_alone_is_its_own_trainer_to_the_bit(
    method: str, lam: float, alone: Any, tiny_base: Path, tmp_path: Path
) -> None:
    """Three passes over rows of unequal length, with accumulation: the same batches in the same order, the same bits."""
    options = {"max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    both = joint_trainer(tiny_base, tmp_path, rows=16, method=method, lam=lam, trainer=options)
    other = alone(tiny_base, tmp_path, trainer=options)
    both.train()
    other.train()
    assert both.taken == ("D" if lam else "S") * 12
    assert identical(factors(both), factors(other))


@pytest.mark.parametrize("method", ["mix", "maxright"])
@pytest.mark.parametrize(("lam", "alone"), [(1.0, dpo_trainer), (0.0, sft_trainer)])
def test_with_dropout_too(
    method: str, lam: float, alone: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks are the same, in all three passes: no loader draws from their generator but where the other trainer's does."""
    for module in ("test_train_joint", "test_train_penalised"):
        monkeypatch.setattr(f"{module}.LORA", {**LORA, "dropout": 0.3})
    options = {"max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    both = joint_trainer(tiny_base, tmp_path, rows=16, method=method, lam=lam, max_eval_steps=3,
                         optima=Optima({"dpo": 0.0, "sft": 0.0}), trainer={**options, "disable_dropout": False})
    set_seed(0)
    both.train()
    other = alone(tiny_base, tmp_path, trainer={**options, "disable_dropout": False} if lam else options)
    set_seed(0)
    other.train()
    assert identical(factors(both), factors(other))


@pytest.mark.parametrize("lam", [0.25, 0.8])
def test_the_gradient_is_the_weighted_sum_of_both(lam: float, tiny_base: Path, tmp_path: Path) -> None:
    both = moved(joint_trainer(tiny_base, tmp_path, lam=lam, trainer=STEP))
    dpo = moved(dpo_trainer(tiny_base, tmp_path, rows=8, trainer=STEP))
    sft = moved(sft_trainer(tiny_base, tmp_path, rows=8, trainer=STEP))
    assert distance(both, {name: lam * dpo[name] + (1 - lam) * sft[name] for name in both}) < 1e-7
    assert min(distance(both, dpo), distance(both, sft)) > 1e-4


@pytest.mark.parametrize("method", ["mix", "alright"])
def test_accumulation_changes_nothing_but_rounding(method: str, tiny_base: Path, tmp_path: Path) -> None:
    """Answers are of unequal length: the mean of an SFT step is over the tokens of all its micro-batches."""
    split = {**STEP, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for lam in (0.0, 0.4, 1.0):
        whole, parted = (
            moved(joint_trainer(tiny_base, tmp_path, method=method, lam=lam, l1=1e-3, l2=1e-2, answer=None, trainer=options))
            for options in (STEP, split)
        )
        assert distance(whole, parted) < 1e-6


def test_both_losses_and_the_penalty_are_logged_apart(tiny_base: Path, tmp_path: Path) -> None:
    trainer = start_away_from_zero(joint_trainer(tiny_base, tmp_path, lam=0.3, l1=1e-3, trainer={**STEP, "max_steps": 2}))
    norm = float(penalty(trainer.model, l1=1.0, l2=0.0)[1].detach())
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["task_loss"] == pytest.approx(0.3 * first["dpo_loss"] + 0.7 * first["sft_loss"], rel=1e-5)
    assert first["loss"] == pytest.approx(first["task_loss"] + 1e-3 * norm, rel=1e-3)
    assert first["l1"] == pytest.approx(norm, rel=1e-6)


def test_conversations_and_a_cycling_sft_set(tiny_base: Path, tmp_path: Path) -> None:
    """Three SFT rows serve sixteen pairs, in an order that the seed repeats; the saved metrics hold both losses."""
    rows = {"sft": sft_rows(3, chat=True, answer=None), "pref": pref_rows(16, chat=True)}
    recipe = JointRecipe(
        model=str(tiny_base), lora=LORA, sft_batch_size=2, trainer={"per_device_train_batch_size": 4, "learning_rate": 1e-2}
    )
    one, two = (train(recipe, tmp_path / name, rows=rows, quiet=True) for name in ("one", "two"))
    assert one["metrics"]["steps"] == 3  # (2 + 4) / 2, since Mix takes both in each
    assert {"sft_loss", "dpo_loss"} <= one["metrics"].keys()
    assert one["content_sha256"] == two["content_sha256"]


def test_sft_rows_that_fill_the_context_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    rows = {
        "sft": [{"prompt": "the cat the cat the cat the cat", "completion": " dog"}],
        "pref": [{"prompt": "cat", "chosen": " yes", "rejected": " no"}] * 4,
    }
    recipe = JointRecipe(model=str(tiny_base), trainer={"max_length": 4, "max_steps": 1})
    with pytest.raises(MismatchError, match="max_length=4"):
        train(recipe, tmp_path / "a", rows=rows, quiet=True)


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {"completion_only_loss": False}]
)
def test_what_is_made_of_sft_rows_is_what_its_own_trainer_makes(options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """To the bit, also where rows are packed, and not what is made without the option."""
    shared = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_length": 32}
    both, plain = (
        joint_trainer(tiny_base, tmp_path, rows=16, method="alright", lam=0.0, trainer=shared, sft_trainer=each)
        for each in (options, {})
    )
    other = sft_trainer(tiny_base, tmp_path, trainer={**shared, **options})
    for trainer in (both, plain, other):
        trainer.train()
    assert identical(factors(both), factors(other))
    assert not identical(factors(both), factors(plain))


@pytest.mark.parametrize(("method", "lam", "expected"), [
    ("mix", 0.0, False), ("mix", 0.4, True), ("alright", 0.0, False), ("alright", 0.4, False), ("alright", 0.9, True)])
def test_the_reference_is_asked_before_only_where_pairs_are_read_twice(
    method: str, lam: float, expected: bool, tiny_base: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 4, "per_device_train_batch_size": 4}  # two passes over 8 pairs, if all steps take them
    assert joint_trainer(tiny_base, tmp_path, method=method, lam=lam, trainer=options).precompute_ref_logps is expected
