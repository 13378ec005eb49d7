"""A recipe's `lora` and `trainer` sections into PEFT's and TRL's own configs, checked against their fields."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from paft.errors import UsageError, did_you_mean
from paft.models import device

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

    from paft.recipe import Lora, TrainRecipe

# Optimisers whose step is a gradient divided by a second moment that `paft.train.proximal` can read.
PROXIMAL = {"adamw_torch", "adamw_torch_fused", "rmsprop", "sgd"}

C = TypeVar("C", bound="TrainingArguments")

# What paft itself decides: an output directory appears complete or not at all, and progress and logs are its own.
OURS = {"output_dir", "seed", "disable_tqdm", "report_to", "beta", "push_to_hub"}


def lora_config(lora: Lora) -> LoraConfig:
    """The recipe's ``lora`` section as a PEFT LoraConfig for a causal language model."""
    from peft import LoraConfig

    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets,  # type: ignore[arg-type]
                      use_rslora=lora.rslora, task_type="CAUSAL_LM")


def check_penalty(recipe: TrainRecipe) -> None:
    """UsageError for keys of the L1 term that contradict each other."""
    if recipe.l1 and recipe.l1_target_sparsity is not None:
        raise UsageError(f"l1 is {recipe.l1:g}, and l1_target_sparsity looks for it", hint="set one of the two; --l1 0 clears l1")
    optim = recipe.trainer.get("optim", "adamw_torch")
    if recipe.l1_solver == "proximal" and optim not in PROXIMAL:
        raise UsageError(f"the proximal solver does not know the steps of trainer.optim {optim}",
                         hint=f"set it to one of {', '.join(sorted(PROXIMAL))}")


def check_options(kind: type, options: dict[str, Any]) -> None:
    """UsageError for a key of ``trainer:`` that the TRL config does not have, or that paft sets itself."""
    known = {field.name for field in dataclasses.fields(kind) if field.init} - OURS
    for key in options:
        if key not in known:
            hint = "set it at the top level of the recipe" if key in OURS else did_you_mean(key, known)[:200]
            raise UsageError(f"trainer.{key} is not an option of TRL's {kind.__name__}", hint=hint)


def trainer_config(kind: type[C], recipe: TrainRecipe, scratch: str, **defaults: Any) -> C:
    """TRL's config: its defaults, then ours for LoRA, then the recipe's ``trainer`` section.

    Ours: one epoch, cosine with 10 % warm-up, batch 8, no checkpoints, bfloat16 autocast and gradient checkpointing on CUDA only.
    """
    check_options(kind, recipe.trainer)
    cuda = device() == "cuda"
    options: dict[str, Any] = {
        "num_train_epochs": 1, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "logging_steps": 10, "save_strategy": "no", "bf16": cuda, "gradient_checkpointing": cuda, "dataloader_pin_memory": cuda,
        **defaults, **recipe.trainer,
        "output_dir": scratch, "seed": recipe.seed, "disable_tqdm": True, "report_to": "none",
    }
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer: {str(error).splitlines()[0][:200]}") from error
