"""SFT with the L1 term: TRL's SFTTrainer and the penalty mixin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from paft.data import Row, dataset
from paft.train.dense import dense
from paft.train.options import peft_config, trainer_config
from paft.train.penalised import Penalised

if TYPE_CHECKING:
    from paft.recipe import SftRecipe


class SparseSFTTrainer(Penalised, SFTTrainer):
    """L = CE + l1·‖δ‖₁ + l2·½‖δ‖² (PAFT eq. 1), with CE the mean over the answer tokens of an optimiser step."""


def build(recipe: SftRecipe, model: Any, tokenizer: Any, rows: list[Row], eval_rows: list[Row], scratch: str) -> Any:
    """An SFT trainer for ``recipe``, ready to train; prompts are masked out of the loss."""
    kind, rate = (dense(SparseSFTTrainer), 2e-5) if recipe.full else (SparseSFTTrainer, 2e-4)
    trainer = kind(
        model=model, args=trainer_config(SFTConfig, recipe, scratch, learning_rate=rate), processing_class=tokenizer,
        train_dataset=dataset(rows), eval_dataset=dataset(eval_rows) if eval_rows else None, peft_config=peft_config(recipe),
    )
    trainer.recipe = recipe
    return trainer
