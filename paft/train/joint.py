"""One trainer for two objectives: a DPOTrainer that also draws SFT batches and weights both losses by a schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import SaveStrategy
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from paft.data import Row, dataset
from paft.errors import MismatchError
from paft.train.options import lora_config, trainer_config
from paft.train.penalised import Penalised
from paft.train.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from paft.recipe import JointRecipe


class TwoObjectives(DPOTrainer):
    """DPO's own loop is the clock; each of its micro-batches is paired with one from the SFT loader, which cycles on its own.

    SFT rows are prepared and scored by SFTTrainer's methods, called on this trainer: every attribute that they touch exists
    here, and DPO's fused-head outputs contain SFT's (kept true by a contract test).
    """

    schedule: Schedule
    sft_batches: Iterator[Any]

    def attach(self, rows: list[Row], config: SFTConfig, schedule: Schedule) -> None:
        """Give the trainer its second data set and its schedule; call once before ``train``."""
        self.schedule = schedule
        self.chat_template = None
        self.completion_only_loss = "completion" in rows[0]
        processing: Any = self.processing_class
        prepared: Any = SFTTrainer._prepare_dataset(self, dataset(rows), processing, config, False, None, "sft")  # type: ignore[arg-type]
        if not len(prepared):
            raise MismatchError(f"no SFT row has an answer within max_length={config.max_length}",
                                hint="raise trainer.max_length")
        size = config.per_device_train_batch_size
        self.sft_batches = _cycle(DataLoader(
            prepared.select_columns(["input_ids", "labels"]), batch_size=size, shuffle=True, drop_last=len(prepared) > size,
            generator=torch.Generator().manual_seed(config.seed),
            collate_fn=DataCollatorForLanguageModeling(pad_token_id=int(self._tokenizer.pad_token_id)),  # type: ignore[arg-type]
        ))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [{"dpo": batch, "sft": next(self.sft_batches)} for batch in batches], None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if "dpo" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = {"dpo": DPOTrainer.compute_loss, "sft": SFTTrainer.compute_loss}
        total = torch.zeros((), device=self.accelerator.device)
        for name, weight in self.schedule(self.state.global_step).items():
            if weight:
                loss = losses[name](self, model, inputs[name])  # type: ignore[arg-type]
                self._metrics["train"][f"{name}_loss"].append(loss.item())
                total = total + weight * loss
        return total


class JointTrainer(Penalised, TwoObjectives):
    """L = Σ_objective weight·loss + penalty."""


def build(recipe: JointRecipe, model: Any, tokenizer: Any, rows: dict[str, list[Row]], scratch: str) -> Any:
    """A joint trainer for ``recipe`` on ``rows`` = {"sft": ..., "pref": ...}."""
    args = trainer_config(DPOConfig, recipe, scratch, learning_rate=5e-5, beta=recipe.beta)
    args.save_strategy = SaveStrategy.NO  # a checkpoint would not know where the SFT data stand
    # Built before the trainer: constructing a config resets accelerate's shared state under a live trainer.
    sft = SFTConfig(output_dir=scratch, seed=recipe.seed, max_length=args.max_length, bf16=args.bf16, report_to="none",
                    per_device_train_batch_size=recipe.sft_batch_size or args.per_device_train_batch_size)
    trainer = JointTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=dataset(rows["pref"]),
                           peft_config=lora_config(recipe.lora))
    trainer.recipe = recipe
    trainer.attach(rows["sft"], sft, SCHEDULES[recipe.method](recipe.lam))
    return trainer


def _cycle(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader
