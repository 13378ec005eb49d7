"""DPO with the reference = the start model with the adapter off: no second model in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from paft.data import Row, dataset
from paft.train.dense import dense
from paft.train.options import peft_config, trainer_config
from paft.train.penalised import Penalised

if TYPE_CHECKING:
    from paft.recipe import DpoRecipe


class PenalisedDPOTrainer(Penalised, DPOTrainer):
    """L = -log σ(β·(Δ_chosen - Δ_rejected)) + penalty, Δ = log π/π_ref summed over an answer's tokens (DPO, eq. 7)."""


def build(recipe: DpoRecipe, model: Any, tokenizer: Any, rows: list[Row], eval_rows: list[Row], scratch: str) -> Any:
    """A DPO trainer for ``recipe``; ``peft_config`` (not a PeftModel) makes TRL take the adapter-off model as reference."""
    # A whole model has no adapter to turn off: what it says before its first step is kept instead of a second model.
    defaults = {"learning_rate": 5e-7 if recipe.full else 5e-6, "beta": recipe.beta, "precompute_ref_log_probs": recipe.full}
    kind = dense(PenalisedDPOTrainer) if recipe.full else PenalisedDPOTrainer
    trainer = kind(
        model=model, args=trainer_config(DPOConfig, recipe, scratch, **defaults),
        processing_class=tokenizer, train_dataset=dataset(rows), eval_dataset=dataset(eval_rows) if eval_rows else None,
        peft_config=peft_config(recipe),
    )
    trainer.recipe = recipe
    return trainer
