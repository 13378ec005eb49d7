"""Every preference loss against TRL's own trainer: the same to the bit at λ = 0, the penalty once per step otherwise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preferencekit import SGD, ours, recipe_of, trls
from trainkit import distance, factors, identical, parts, pref_rows, start_away_from_zero
from trl.data_utils import unpair_preference_dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from paft.data import dataset
from paft.errors import UsageError
from paft.train import losses, preference
from paft.train.l1 import penalty

PAIRS = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
         "apo_down", "discopop", "sft", "sigmoid_norm"]
SMOOTHED = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 1e-3}}
# loss -> (TRL's trainer, its config, what makes it that loss there)
TRL: dict[str, Any] = {
    name: (DPOTrainer, DPOConfig, {"loss_type": [name], "beta": 0.1, **SMOOTHED.get(name, {})}) for name in PAIRS}
TRL |= {name: (KTOTrainer, KTOConfig, {"loss_type": name, "beta": 0.1}) for name in ("kto", "apo_zero_unpaired")}
TRL |= {"orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.1}),
        "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0})}
FAMILIES = pytest.mark.parametrize("loss", ["ipo", "kto", "orpo", "simpo"])


def test_every_loss_of_this_trl_is_known_and_tested() -> None:
    assert set(losses.families()) == set(TRL)


@pytest.mark.parametrize("loss", TRL)
def test_without_penalty_it_is_trl_to_the_bit(loss: str, tiny_base: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    mine, plain = ours(tiny_base, tmp_path, loss, trainer=trainer), trls(tiny_base, tmp_path, loss, *TRL[loss], trainer=trainer)
    before = factors(plain)
    mine.train()
    plain.train()
    assert plain.state.global_step == 2 and not identical(before, factors(plain))
    assert identical(factors(mine), factors(plain))


@FAMILIES
@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_step_is_the_task_gradient_plus_the_penaltys(loss: str, accumulation: int, tiny_base: Path, tmp_path: Path) -> None:
    rate = 1e-3
    options = {**SGD, "learning_rate": rate, "max_steps": 1, "gradient_accumulation_steps": accumulation}
    free = start_away_from_zero(ours(tiny_base, tmp_path, loss, trainer=options))
    start, parameters = factors(free), dict(free.model.named_parameters())
    value, norm = penalty(free.model, l1=1.0, l2=0.5)
    slope = dict(zip(start, torch.autograd.grad(value, [parameters[name] for name in start]), strict=True))
    free.train()
    bound = start_away_from_zero(ours(tiny_base, tmp_path, loss, l1=1.0, l2=0.5, trainer=options))
    assert identical(start, factors(bound))
    bound.train()
    assert distance(factors(bound), {name: tensor - rate * slope[name] for name, tensor in factors(free).items()}) < 1e-6
    first = bound.state.log_history[0]
    assert first["l1"] == pytest.approx(float(norm), rel=1e-5)
    assert first["loss"] == pytest.approx(first["task_loss"] + float(value.detach()), rel=1e-4)


@FAMILIES
def test_eval_loss_is_the_task_alone(loss: str, tiny_base: Path, tmp_path: Path) -> None:
    free, bound = (start_away_from_zero(ours(tiny_base, tmp_path, loss, held=6, l1=l1)) for l1 in (0.0, 1e3))
    found = free.evaluate()
    assert found["eval_loss"] == bound.evaluate()["eval_loss"]
    assert math.isfinite(found["eval_rewards/margins"])


def test_a_sum_of_losses_has_the_weighted_sum_of_their_gradients(tiny_base: Path, tmp_path: Path) -> None:
    def update(loss: Any) -> dict[str, torch.Tensor]:
        trainer = start_away_from_zero(ours(tiny_base, tmp_path, loss, trainer={**SGD, "max_steps": 1}))
        before = factors(trainer)
        trainer.train()
        return {name: tensor - before[name] for name, tensor in factors(trainer).items()}

    one, other, both = update("sigmoid"), update("sft"), update({"sigmoid": 0.5, "sft": 0.2})
    assert distance(both, {name: 0.5 * one[name] + 0.2 * other[name] for name in one}) < 1e-6
    assert max(float(tensor.abs().max()) for tensor in both.values()) > 1e-4
    assert identical(update(["sigmoid", "sft"]), update({"sigmoid": 1.0, "sft": 1.0}))


def test_pairs_are_taken_apart_as_trl_does_and_mixed(tiny_base: Path, tmp_path: Path) -> None:
    """TRL's order is all desirable rows first, and KTO reads its rows in order."""
    def key(row: Any) -> tuple[Any, ...]:
        return row["prompt"], row["completion"], row["label"]

    theirs = list(unpair_preference_dataset(dataset(pref_rows(8))))
    assert sorted(map(key, losses.unpair(pref_rows(8)))) == sorted(map(key, theirs))
    labels = [ours(tiny_base, tmp_path, "kto", seed=seed).train_dataset["label"] for seed in (0, 0, 1)]
    assert labels[0] == labels[1] != labels[2]
    assert all(0 < sum(label[:8]) < 8 for label in labels)


def test_simpos_beta_is_its_own_unless_said(tiny_base: Path) -> None:
    assert [recipe_of(tiny_base, loss).beta for loss in ("sigmoid", "orpo", "simpo")] == [0.1, 0.1, 2.0]
    assert recipe_of(tiny_base, "simpo", beta=2.5).beta == 2.5


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_rows_without_room_for_an_answer_are_dropped(loss: str, tiny_base: Path, tmp_path: Path) -> None:
    """TRL keeps them, and the mean over no token is NaN."""
    lengths = [len(row["prompt"].split()) for row in pref_rows(8)]
    fill = sorted(lengths)[3]
    trainer = ours(tiny_base, tmp_path, loss, held=8, trainer={"max_length": fill, "max_steps": 1, "logging_steps": 10})
    assert len(trainer.train_dataset) == sum(length < fill for length in lengths) > 0
    trainer.train()
    closing = trainer.state.log_history[-1]
    assert math.isfinite(closing["task_loss"]) and math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(("loss", "trainer", "said"), [
    ("sigmod", {}, "there is no loss 'sigmod'"), (["kto", "sft"], {}, "'kto' cannot be added"),
    (["sft", "orpo"], {}, "'orpo' cannot be added"), ([], {}, "names no loss"),
    ({"kto": 0.5}, {}, "takes no weight"), ("ipo", {"loss_type": "ipo"}, "set by `loss`"),
    (["ipo", "sft"], {"loss_weights": [1, 1]}, "set by `loss`"), ("robust", {"label_smoothing": 0.5}, "0 <= trainer.label_smoo"),
    ("kto", {"per_device_train_batch_size": 1}, "per_device_train_batch_size >= 2"),
    ("kto", {"train_sampling_strategy": "random"}, "train_sampling_strategy=sequential")])
def test_losses_that_cannot_be(loss: Any, trainer: dict[str, Any], said: str, tiny_base: Path) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        losses.check(recipe_of(tiny_base, loss, trainer=trainer))
    assert caught.value.hint or loss == "robust"


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind_are_refused(loss: str, label: bool, tiny_base: Path, tmp_path: Path) -> None:
    rows = [row for row in losses.unpair(pref_rows(8)) if row["label"] is label]
    with pytest.raises(UsageError, match=f"all 8 labels are {str(label).lower()}"):
        preference.build(recipe_of(tiny_base, loss), *parts(tiny_base), rows, [], str(tmp_path))
