"""Every private or half-public name of TRL and transformers that the unified loss builds on, with the place that does."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from transformers import Trainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from uftkit import JointRecipe, ours

from paft.errors import UsageError
from paft.train import uft


def test_the_loss_is_computed_in_one_method() -> None:
    """`UFTTrainer._compute_loss` stands in its place and calls no super."""
    assert list(inspect.signature(KTOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"]
    assert "self._compute_loss(model, inputs, return_outputs)" in inspect.getsource(KTOTrainer.compute_loss)
    source = inspect.getsource(KTOTrainer._compute_loss)
    assert "outputs = model(**model_kwargs, labels=completion_labels, fused_lm_head=True)" in source
    assert "loss = loss + self.router_aux_loss_coef * aux_loss" in source
    assert "self._total_train_tokens += " in source, "train.keeper carries it over"
    source = inspect.getsource(KTOTrainer.compute_ref_log_probs)
    assert 'inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)' in source, "the same tokens as the policy's"


def test_columns_pass_by_their_names(tiny_base: Path, tmp_path: Path) -> None:
    """`_set_signature_columns_if_needed` names them, and the sampler gets what is left after `_remove_unused_columns`."""
    source = inspect.getsource(Trainer._get_dataloader)
    assert source.index("_remove_unused_columns(dataset") < source.index("sampler_fn(dataset)")
    trainer = ours(tiny_base, tmp_path)
    names = next(iter(trainer.get_train_dataloader())).keys()
    assert {"label", "feedback", "input_ids", "completion_mask"} <= names
    assert vars(DataCollatorForUnpairedPreference(pad_token_id=0)).keys() == vars(trainer.data_collator).keys(), "WithKind's"


def test_the_order_of_rows_is_asked_of_one_method(tiny_base: Path, tmp_path: Path) -> None:
    assert list(inspect.signature(KTOTrainer._get_train_sampler).parameters) == ["self", "train_dataset"]
    assert "sampler_fn=self._get_train_sampler" in inspect.getsource(Trainer.get_train_dataloader)
    assert "self.state.epoch = epoch + (step + 1) / steps_in_epoch" in inspect.getsource(Trainer._run_epoch), "whole at its end"


def test_this_loss_type_needs_no_rows_for_a_kl_term(tiny_base: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_base, tmp_path, trainer={"per_device_train_batch_size": 1})
    assert trainer.calculate_KL is False
    assert "KL_completion_ids" not in trainer.train_dataset.column_names


@pytest.mark.parametrize("name", uft.REFUSED)
def test_what_is_refused_exists(name: str) -> None:
    assert hasattr(KTOConfig(use_cpu=True, bf16=False), name)
    recipe = JointRecipe(trainer={name: 1})
    with pytest.raises(UsageError, match=name):
        uft.check(recipe)
