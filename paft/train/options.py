"""A recipe's `lora` and `trainer` sections into PEFT's and TRL's own configs, checked against their fields and types."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from paft.errors import UsageError, did_you_mean
from paft.models import device

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

    from paft.recipe import Lora, TrainRecipe

# Optimisers whose step is a gradient divided by a second moment that `paft.train.proximal` can read.
PROXIMAL = {"adamw_torch", "adamw_torch_fused", "rmsprop", "sgd"}

C = TypeVar("C", bound="TrainingArguments")

_TOP, _HUB = "set it at the top level of the recipe", "upload what was made: `hf upload org/name DIR`"
# What paft itself decides, and where it is to be said instead. Fields that start with hub_ are answered as push_to_hub is.
OURS = {
    "output_dir": "pass -o DIR", "seed": _TOP, "beta": _TOP, "disable_tqdm": "pass -q", "push_to_hub": _HUB,
    "resume_from_checkpoint": "pass --resume", "restore_callback_states_from_checkpoint": "--resume always does",
    "ignore_data_skip": "--resume goes on in the data where it stopped",
    "save_only_model": "--resume needs the rest; save_total_limit and save_steps bound the disk",
    "model_init_kwargs": "set model, dtype or quantize at the top level of the recipe",
    "do_train": "leave it out", "do_eval": "pass --eval-data or --eval-fraction", "do_predict": "use `paft eval`",
}


def lora_config(lora: Lora) -> LoraConfig:
    """The recipe's ``lora`` section as a PEFT LoraConfig for a causal language model."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets,  # type: ignore[arg-type]
        exclude_modules=lora.exclude, layers_to_transform=lora.layers, use_rslora=lora.rslora, use_dora=lora.dora,
        rank_pattern=dict(lora.rank_pattern), alpha_pattern=dict(lora.alpha_pattern), bias=lora.bias, task_type="CAUSAL_LM",
        modules_to_save=lora.modules_to_save or None, init_lora_weights=True if lora.init == "default" else lora.init)  # type: ignore[arg-type]


def peft_config(recipe: TrainRecipe) -> LoraConfig | None:
    """What TRL is to wrap the model in; None for full fine-tuning."""
    return None if recipe.full else lora_config(recipe.lora)


def check_penalty(recipe: TrainRecipe) -> None:
    """UsageError for keys of the L1 term that contradict each other."""
    if recipe.l1 and recipe.l1_target_sparsity is not None:
        raise UsageError(f"l1 is {recipe.l1:g}, and l1_target_sparsity looks for it", hint="set one of the two; --l1 0 clears l1")
    optim = recipe.trainer.get("optim", "adamw_torch")
    if recipe.full and (recipe.l1_solver == "proximal" or recipe.l1_target_sparsity is not None):
        raise UsageError("full fine-tuning has neither the proximal solver nor a target: they act on the factors of a LoRA",
                         hint="set --l1 alone")
    if recipe.l1_solver == "proximal" and optim not in PROXIMAL:
        raise UsageError(f"the proximal solver does not know the steps of trainer.optim {optim}",
                         hint=f"set it to one of {', '.join(sorted(PROXIMAL))}")


def check_options(kind: type, options: dict[str, Any]) -> None:
    """UsageError for a key of ``trainer:`` that the TRL config does not have or paft sets itself, or a value of another type."""
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    types = typing.get_type_hints(kind)
    for key, value in options.items():
        ours = OURS.get("push_to_hub" if key.startswith("hub_") else key)
        if key in known and ours:
            raise UsageError(f"trainer.{key} is not set here: paft sees to it", hint=ours)
        if key not in known:
            raise UsageError(f"trainer.{key} is not an option of TRL's {kind.__name__}", hint=did_you_mean(key, known)[:200])
        try:
            TypeAdapter(types[key], config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError:
            wanted = getattr(types[key], "__name__", None) or str(types[key]).replace("typing.", "")
            raise UsageError(f"trainer.{key} is {value!r}, which is no {wanted}"[:200]) from None


def trainer_config(kind: type[C], recipe: TrainRecipe, scratch: str, **defaults: Any) -> C:
    """TRL's config: its defaults, then ours for LoRA, then the recipe's ``trainer`` section.

    Ours: one epoch, cosine with 10 % warm-up, batch 8, the last two checkpoints, bfloat16 autocast and gradient checkpointing on
    CUDA only, no reports. Where the best checkpoint is wanted, ten evaluations over the run, each with a checkpoint.
    """
    check_options(kind, recipe.trainer)
    cuda = device() == "cuda"
    options: dict[str, Any] = {
        "num_train_epochs": 1, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "logging_steps": 10, "save_total_limit": 2, "bf16": cuda, "gradient_checkpointing": cuda, "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,  # a LoRA has none, and to look for them costs a pass over the graph
        "use_cpu": not cuda, "report_to": "none", **defaults, **_best(recipe), **recipe.trainer,
        "output_dir": scratch, "seed": recipe.seed, "disable_tqdm": True, "restore_callback_states_from_checkpoint": True,
    }
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer: {str(error).splitlines()[0][:200]}") from error


def wants_evaluation(recipe: TrainRecipe) -> str | None:
    """The key of the recipe that needs evaluation data, if there is one."""
    said = recipe.trainer
    for key in ("early_stopping", "stop_front"):
        if getattr(recipe, key, None):
            return key
    if said.get("load_best_model_at_end"):
        return "trainer.load_best_model_at_end"
    return "trainer.eval_strategy" if said.get("eval_strategy", "no") != "no" else None


def _best(recipe: TrainRecipe) -> dict[str, Any]:
    """The best checkpoint is one that was evaluated, so both come at the same steps."""
    said = recipe.trainer
    if not (recipe.early_stopping or said.get("load_best_model_at_end")):
        return {}
    strategy, steps = said.get("eval_strategy", "steps"), said.get("eval_steps", 0.1)
    return {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
            "eval_strategy": strategy, "eval_steps": steps, "save_strategy": strategy, "save_steps": steps}
