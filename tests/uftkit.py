"""Trainers of the unified loss on the tiny base, and that loss by its definition in float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from preferencekit import LORA
from safetensors.torch import save_file
from test_train_reference import log_probability
from torch import Tensor
from trainkit import factors, parts, pref_rows, sft_rows
from transformers import AutoModelForCausalLM, set_seed

from paft.recipe import JointRecipe
from paft.train import uft
from paft.train.options import lora_config
from paft.train.reference import Reference

# Three kinds of feedback: pairs, labels, scores.
FEEDBACK = [*pref_rows(2, seed=1),
            {"prompt": "the cat", "completion": " is not a dog", "label": False},
            {"prompt": "one two", "completion": " three", "label": True},
            {"prompt": "where is it", "completion": " left or right one", "label": 0.3},
            {"prompt": "hello", "completion": " they", "label": 0.5}]
ROWS = {"sft": sft_rows(5, answer=None), "pref": FEEDBACK}
# r of five instruction rows, two pairs, two labels, two scores.
TARGETS = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 0.3, 0.5], dtype=torch.float64)


def ours(base: Path, scratch: Path, rows: Any = ROWS, *, held: Reference | None = None, **fields: Any) -> Any:
    recipe = JointRecipe(model=str(base), lora=LORA, **fields)
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
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    policy: Any = get_peft_model(plain, lora_config(trainer.recipe.lora))
    state = {name: tensor.double() for name, tensor in trainer.model.state_dict().items() if ".ref." not in name}
    policy.double().load_state_dict(state)
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


# One process or two: SGD at a constant rate into the second epoch, so that the factors tell which rows were read.
STEPS = {"max_steps": 7, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0,
         "max_grad_norm": 0.0, "logging_steps": 1, "save_steps": 5, "use_cpu": True, "dataloader_drop_last": True}


def trained(base: Path, scratch: Path, resume: Path | None = None, **options: Any) -> Any:
    """13 rows an epoch, 4 a step: the fifth step is the second of the second epoch."""
    trainer = ours(base, scratch, beta=1.0, trainer={**STEPS, **options})
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def in_a_process(rank: int, base: str, out: str, port: int) -> None:
    """One of two: trains, and again from the checkpoint within the second epoch; each writes its factors."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for name, resume in (("whole", None), ("resumed", Path(out) / "two" / "checkpoint-5")):
        trainer = trained(Path(base), Path(out) / "two", resume, per_device_train_batch_size=2)
        save_file(factors(trainer), Path(out) / f"{name}-{rank}.safetensors")
    torch.distributed.destroy_process_group()
