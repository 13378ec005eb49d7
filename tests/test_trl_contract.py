"""Every private or half-public name of TRL, transformers and PEFT that paft builds on, with the place that does.

When an upgrade breaks one of these, the message says what to look at; the numeric tests say whether it still adds up.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_train_penalised import dpo_trainer, sft_trainer
from trainkit import parts, pref_rows, sft_rows
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from paft.recipe import JointRecipe
from paft.train import joint
from paft.train.options import OURS


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "names", "where"),
    [
        (
            SFTTrainer._prepare_dataset,
            ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
            "TwoSets.attach calls it by position",
        ),
        (
            Trainer.get_batch_samples,
            ["self", "epoch_iterator", "num_batches", "device"],
            "TwoObjectives.get_batch_samples overrides it",
        ),
        (
            SFTTrainer.compute_loss,
            ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
            "Penalised.compute_loss overrides it",
        ),
        (
            DPOTrainer.compute_loss,
            ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
            "Penalised.compute_loss overrides it",
        ),
        (SFTTrainer.log, ["self", "logs", "start_time"], "Penalised.log overrides it"),
        (DPOTrainer.log, ["self", "logs", "start_time"], "Penalised.log overrides it"),
    ],
)
def test_signatures(function: Any, names: list[str], where: str) -> None:
    assert parameters(function) == names, where


@pytest.mark.parametrize(("kind", "value"), [(SFTTrainer, None), (DPOTrainer, False)])
def test_who_divides_by_the_accumulation_steps(kind: Any, value: bool | None) -> None:
    assert kind.loss_is_scaled_for_ga is value, "Penalised._scaled_already: None means `num_items_in_batch is not None`"


def test_the_trainer_sets_what_the_penalty_reads_before_each_step() -> None:
    source = inspect.getsource(Trainer)
    assert "self.current_gradient_accumulation_steps = len(batch_samples)" in source, "Penalised._penalty multiplies by it"
    assert "self.accelerator.gradient_state._set_sync_gradients(do_sync_step)" in source, (
        "Penalised adds when sync_gradients is set"
    )
    assert "loss = loss / self.current_gradient_accumulation_steps" in source, "Penalised._penalty undoes this division"


@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
def test_a_trainer_has_what_we_touch(make: Any, tiny_base: Path, tmp_path: Path) -> None:
    trainer = make(tiny_base, tmp_path)
    assert set(trainer._metrics) == {"train", "eval"} and trainer._metrics["train"]["new"] == [], (
        "Penalised logs through _metrics"
    )
    assert isinstance(trainer.accelerator.gradient_state.sync_gradients, bool), "Penalised.compute_loss"
    assert any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks), "stage._run removes PrinterCallback"
    assert isinstance(trainer.compute_loss_context_manager(), contextlib.ExitStack)
    with trainer.compute_loss_context_manager():
        assert not torch.is_autocast_enabled(), "compute_loss runs outside autocast, so the penalty is in float32"
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.scaling["default"] * B @ A
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, msg="l1.lora_factors: δ = scaling·B·A")
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.model.named_parameters())


def test_dpo_takes_the_model_without_its_adapter_as_reference(tiny_base: Path, tmp_path: Path) -> None:
    trainer = dpo_trainer(tiny_base, tmp_path)
    assert trainer.ref_model is None, "dpo.build passes peft_config so that no second model is kept"
    assert set(trainer.model.peft_config) == {"default"}, "TRL keeps a copy `ref` of an adapter that it is given"


def attributes_of_self(function: Any) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def joint_trainer(base: Path, scratch: Path) -> Any:
    recipe = JointRecipe(model=str(base), lora={"r": 2}, trainer={"max_steps": 1})
    return joint.build(recipe, *parts(base), {"sft": sft_rows(8), "pref": pref_rows(8)}, str(scratch))


@pytest.mark.parametrize("function", [SFTTrainer._prepare_dataset, SFTTrainer.compute_loss])
def test_a_dpo_trainer_has_all_that_sfts_methods_read(function: Any, tiny_base: Path, tmp_path: Path) -> None:
    trainer = joint_trainer(tiny_base, tmp_path)
    later = {"current_gradient_accumulation_steps"}  # set by the loop of every Trainer, see above
    missing = {name for name in attributes_of_self(function) - later if not hasattr(trainer, name)}
    assert not missing, f"TwoSets calls SFTTrainer.{function.__name__} on a DPOTrainer: give it {missing} in attach"


def test_a_dpo_model_returns_what_sfts_loss_reads(tiny_base: Path, tmp_path: Path) -> None:
    trainer = joint_trainer(tiny_base, tmp_path)
    outputs = trainer.model(**trainer.batches["sft"].peek(1)[0], fused_lm_head=True)
    missing = {name for name in ("log_probs", "label_mask", "entropy", "is_top1") if getattr(outputs, name, None) is None}
    assert not missing, "TwoSets.loss_of: SFTTrainer.compute_loss on DPO's patched model"
    assert "dft" not in trainer.args.loss_type and trainer.args.loss_type != "dft", "SFT's loss reads DPO's args.loss_type"


def test_the_sft_collator_pads_and_masks() -> None:
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]], "joint.py feeds it prepared rows"
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig])
def test_configs_have_the_fields_that_we_set(kind: type) -> None:
    known = set(kind.__dataclass_fields__)
    ours = set(OURS) - ({"beta"} if kind is SFTConfig else set())
    used = {
        "num_train_epochs",
        "per_device_train_batch_size",
        "lr_scheduler_type",
        "warmup_steps",
        "logging_steps",
        "save_strategy",
        "bf16",
        "gradient_checkpointing",
        "dataloader_pin_memory",
        "learning_rate",
        "max_length",
        "max_steps",
        "gradient_accumulation_steps",
        "dataloader_drop_last",
    }
    assert (used | ours) <= known, "train/options.py and stage.plan"
    assert issubclass(kind, TrainingArguments)
