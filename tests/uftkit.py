"""Trainers of the unified loss on the tiny base, and that loss by its definition in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from preferencekit import LORA
from test_train_reference import log_probability
from torch import Tensor
from trainkit import parts, pref_rows, sft_rows
from transformers import AutoModelForCausalLM, set_seed

from paft.recipe import JointRecipe
from paft.train import uft
from paft.train.options import lora_config
from paft.train.reference import Reference


class UftRecipe(JointRecipe):
    """Until `JointRecipe` has the field."""

    uft_loss: Literal["mse", "bce"] = "mse"


# Three kinds of feedback: pairs, labels, scores.
FEEDBACK = [*pref_rows(2, seed=1),
            {"prompt": "the cat", "completion": " is not a dog", "label": False}, {"prompt": "one two", "completion": " three", "label": True},
            {"prompt": "where is it", "completion": " left or right one", "label": 0.3}, {"prompt": "hello", "completion": " they", "label": 0.5}]
ROWS = {"sft": sft_rows(5, answer=None), "pref": FEEDBACK}


def ours(base: Path, scratch: Path, rows: Any = ROWS, *, held: Reference | None = None, **fields: Any) -> Any:
    recipe = UftRecipe(model=str(base), lora=LORA, **fields)
    set_seed(recipe.seed)
    return uft.build(recipe, *parts(base), rows, str(scratch), held, quiet=True)


def batch(trainer: Any, indices: Any) -> dict[str, Tensor]:
    rows = trainer.train_dataset
    return trainer.data_collator([rows[index] for index in indices])


def value_and_gradient(trainer: Any, indices: Any) -> tuple[float, dict[str, Tensor]]:
    """The trainer's own, of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch(trainer, indices))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def in_float64(trainer: Any, base: Path) -> Any:
    """The policy as a plain PEFT model, with transformers' own forward."""
    policy: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), lora_config(trainer.recipe.lora))
    policy.double().load_state_dict({name: tensor.double() for name, tensor in trainer.model.state_dict().items() if ".ref." not in name})
    return policy.eval()


def rewards(trainer: Any, policy: Any, reference: Any, rows: Any) -> Tensor:
    """z of every row."""
    tokenizer = trainer.processing_class
    with torch.no_grad():
        fixed = [log_probability(reference, tokenizer, row, "completion") for row in rows]
    moving = [log_probability(policy, tokenizer, row, "completion") for row in rows]
    return trainer.recipe.beta * (torch.stack(moving) - torch.stack(fixed))


def explicit(kind: str, reward: Tensor, target: Tensor) -> Tensor:
    """The loss of each row, from probabilities."""
    p = 1 / (1 + torch.exp(-reward))
    return (p - target) ** 2 if kind == "mse" else -(target * torch.log(p) + (1 - target) * torch.log(1 - p))
