"""A DPOTrainer with a second data set: SFT rows are prepared and scored by SFTTrainer's methods, called on this trainer.

Every attribute that they touch exists here, and DPO's fused-head outputs contain SFT's (kept true by a contract test). Building
an SFTTrainer and a DPOTrainer on one model is no way: each of them patches the model's head.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from paft.data import Row, dataset
from paft.errors import MismatchError, UsageError
from paft.train.batches import Batches
from paft.train.rendering import training_template

PAIR = ["prompt_ids", "chosen_ids", "rejected_ids"]


class TwoSets(DPOTrainer):
    """``batches`` = {"dpo": ..., "sft": ...}: those of a DPOTrainer and of an SFTTrainer alone, with the same seed."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    batches: dict[str, Batches]

    def attach(self, rows: list[Row], config: SFTConfig) -> None:
        """Give the trainer its SFT rows; MismatchError where no row of them fits ``max_length``."""
        processing: Any = self.processing_class
        self.chat_template = training_template(processing) if config.assistant_only_loss else None
        asked = config.completion_only_loss
        self.completion_only_loss = "completion" in rows[0] if asked is None else asked
        given: Any = dataset(rows)
        prepared: Any = SFTTrainer._prepare_dataset(self, given, processing, config, config.packing, None, "sft")  # type: ignore[arg-type]
        if hasattr(prepared, "__len__") and not len(prepared):
            raise MismatchError(f"no SFT row has an answer within max_length={config.max_length}",
                                hint="raise trainer.max_length")
        collator = DataCollatorForLanguageModeling(
            pad_token_id=int(self._tokenizer.pad_token_id),  # type: ignore[arg-type]
            padding_free=config.packing and config.packing_strategy != "wrapped",
            pad_to_multiple_of=config.pad_to_multiple_of)  # type: ignore[arg-type]
        self.sft_rows, self.sft_size = prepared, config.per_device_train_batch_size
        self.batches = {"dpo": Batches(super().get_train_dataloader()),
                        "sft": Batches(self._loader(prepared, collator, config.per_device_train_batch_size))}

    def _loader(self, rows: Any, collator: Any, size: int) -> Any:
        """The loader that an SFTTrainer would have."""
        pairs, self.data_collator = self.data_collator, collator
        try:
            return self._get_dataloader(rows, "SFT", size, self._get_train_sampler, is_training=True)  # type: ignore[arg-type]
        finally:
            self.data_collator = pairs

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns  # type: ignore[assignment]
        self._signature_columns = [*known, *(name for name in ("input_ids", "labels", "seq_lengths") if name not in known)]

    def loss_of(self, name: str, model: Any, batch: Any, items: Any) -> Any:
        """The loss of one micro-batch. Of SFT it is the part of a sum where ``items``, the step's answer tokens, are known."""
        if name == "sft":
            return SFTTrainer.compute_loss(self, model, batch, num_items_in_batch=items)  # type: ignore[arg-type]
        was = self.precompute_ref_logps
        self.precompute_ref_logps = "ref_chosen_logps" in batch
        try:
            return super().compute_loss(model, batch)
        finally:
            self.precompute_ref_logps = was

    @staticmethod
    def summed(name: str, items: Any) -> bool:
        """Are the losses of an objective's micro-batches parts of a sum, rather than means?"""
        return name == "sft" and items is not None

    def refer(self, model: Any, batch: Any) -> None:
        """Ask the reference about a batch of pairs now, so that it is not asked again."""
        if "ref_chosen_logps" not in batch:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = self.compute_ref_log_probs(model, batch)

    def tokens_a_step(self) -> dict[str, float]:
        """Mean tokens of an optimiser step of each objective, over all processes; UsageError for rows that are streamed."""
        if not all(isinstance(rows, Dataset) for rows in (self.train_dataset, self.sft_rows)):
            raise UsageError("a budget of tokens needs rows that can be counted, not streamed",
                             hint="leave --max-tokens or --streaming out")
        limit, pairs, args = self.args.max_length or 1 << 30, self.train_dataset.select_columns(PAIR), self.args  # type: ignore[union-attr]
        sizes = {
            "dpo": [min(len(row["prompt_ids"]) + len(row[side]), limit) for row in pairs for side in PAIR[1:]],  # type: ignore[index]
            "sft": [len(ids) for ids in self.sft_rows["input_ids"]],
        }
        step = args.gradient_accumulation_steps * args.world_size
        rows = {"dpo": 2 * args.per_device_train_batch_size, "sft": self.sft_size}
        return {name: step * rows[name] * sum(found) / len(found) for name, found in sizes.items()}
