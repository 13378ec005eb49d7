"""Every private or half-public name of TRL and PEFT that preference training builds on, with the place that does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from preferencekit import ours
from trainkit import pref_rows
from trl.data_utils import unpair_preference_dataset
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from paft.data import dataset
from paft.train import losses
from paft.train.dpo import PenalisedDPOTrainer, PenalisedKTOTrainer

WITH_REFERENCE = pytest.mark.parametrize("kind", [PenalisedDPOTrainer, PenalisedKTOTrainer])
OLD = pytest.mark.parametrize("kind", [ORPOTrainer, CPOTrainer])


@pytest.mark.parametrize("kind", [KTOTrainer, ORPOTrainer, CPOTrainer])
def test_the_seam_of_the_penalty(kind: Any) -> None:
    names = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert list(inspect.signature(kind.compute_loss).parameters) == names, "Penalised.compute_loss overrides it"
    assert list(inspect.signature(kind.log).parameters) == ["self", "logs", "start_time"], "Penalised.log overrides it"
    assert kind.loss_is_scaled_for_ga is False, "Penalised multiplies by the accumulation steps"


@pytest.mark.parametrize(("kind", "family"), [(DPOTrainer, losses.DPO), (KTOTrainer, losses.KTO)])
def test_the_losses_are_those_of_the_source(kind: Any, family: losses.Family) -> None:
    """`losses.families` reads them from the config's help (DPO) and choices (KTO)."""
    compared = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(kind._compute_loss)))
    assert {name for name, found in losses.families().items() if found is family} == compared


@WITH_REFERENCE
def test_the_reference_is_an_adapter_called_ref_and_its_columns_are_read(kind: Any) -> None:
    source = inspect.getsource(kind.__mro__[2]._compute_loss) + inspect.getsource(kind.compute_ref_log_probs)
    assert source.count('"ref" if "ref" in') == 2, "reference.attach loads one"
    assert "if self.precompute_ref_logps:" in source, "precompute sets it"
    for column in kind.reference_columns:
        assert f'["{column}"]' in source, f"precompute adds {column}"
    assert list(inspect.signature(kind.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    assert set(kind.reference_columns) <= set(re.findall(r'"(\w+)"', inspect.getsource(kind._set_signature_columns_if_needed)))


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_trainer_has_what_precompute_touches(loss: str, tiny_base: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_base, tmp_path, loss, trainer={"max_steps": 1})
    assert (trainer.ref_model, trainer.precompute_ref_logps) == (None, False), "no second model, TRL's own pass left out"
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled, trainer.args.world_size) == (False, False, 1)
    assert trainer.args.precompute_ref_batch_size is None


@OLD
def test_the_old_trainers_keep_their_metrics_in_a_store_of_their_own(kind: Any) -> None:
    assert not hasattr(kind, "_metrics"), "_OldStyle._metrics stands in"
    source = inspect.getsource(kind.log)
    assert 'train_eval = "train" if "loss" in logs else "eval"' in source, "_OldStyle.log brings the last record its values"
    assert "del self._stored_metrics[train_eval]" in source
    assert 'batch[f"{k}{type_key}"] = tokens' in inspect.getsource(kind.tokenize_row), "_has_answers reads chosen_labels"


def test_trl_takes_pairs_apart_one_kind_after_the_other() -> None:
    """Why `preference._shuffled` mixes the rows of KTO."""
    assert unpair_preference_dataset(dataset(pref_rows(4)))["label"] == [True] * 4 + [False] * 4


def test_kto_reads_its_rows_in_order(tiny_base: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_base, tmp_path, "kto", trainer={"max_steps": 1, "per_device_train_batch_size": 4})
    rows = trainer.train_dataset
    for index, partner in ((0, 3), (1, 0), (4, 7), (5, 4)):
        assert rows[index]["KL_completion_ids"] == rows[partner]["completion_ids"], "losses._refuse_kto"
    assert trainer.args.train_sampling_strategy == "sequential"
