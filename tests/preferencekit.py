"""Preference trainers of every family, ours and TRL's own, on the tiny base."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from trainkit import parts, pref_rows
from transformers import set_seed

from paft.data import dataset
from paft.recipe import DpoRecipe
from paft.train import losses, preference
from paft.train.options import lora_config, trainer_config
from paft.train.reference import Reference

# Plain SGD at a constant rate: adapters then differ exactly as their gradients do.
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 0.5, "max_grad_norm": 0.0,
       "logging_steps": 1, "per_device_train_batch_size": 4}
LORA = {"r": 3, "alpha": 6}

gc.freeze()  # every `Trainer.train` collects garbage, and half of a tiny training went into looking at the libraries' objects


def recipe_of(base: Path, loss: Any, **fields: Any) -> DpoRecipe:
    return DpoRecipe(model=str(base), lora=LORA, loss=loss, **fields)


def rows_of(recipe: DpoRecipe, count: int, seed: int = 0) -> Any:
    pairs = pref_rows(count, seed=seed)
    return losses.unpair(pairs) if losses.family(recipe).labelled else pairs


def ours(base: Path, scratch: Path, loss: Any, *, reference: Reference | None = None, held: int = 0, **fields: Any) -> Any:
    recipe = recipe_of(base, loss, **fields)
    set_seed(recipe.seed)
    rows, held_rows = rows_of(recipe, 8), rows_of(recipe, held, seed=5)
    return preference.build(recipe, *parts(base), rows, held_rows, str(scratch), reference, quiet=True)


def trls(base: Path, scratch: Path, loss: Any, kind: Any, config: Any, options: dict[str, Any], **fields: Any) -> Any:
    """TRL's trainer with TRL's names for the loss, on the rows that ours reads."""
    recipe = recipe_of(base, loss, **fields)
    set_seed(recipe.seed)
    rows = rows_of(recipe, 8)
    if losses.family(recipe).labelled:
        rows = preference._shuffled(rows, recipe.seed)
    model, tokenizer = parts(base)
    args = trainer_config(config, recipe, str(scratch), **options)
    return kind(model=model, args=args, processing_class=tokenizer, train_dataset=dataset(rows),
                peft_config=lora_config(recipe.lora))


def columns(base: str, scratch: str) -> dict[str, list[float]]:
    """The reference log-probabilities of rows that no batch divides, computed once, of pairs and of labelled rows."""
    found: dict[str, list[float]] = {}
    for loss in ("ipo", "kto"):
        options = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 3, "max_steps": 1, "use_cpu": True}
        rows = ours(Path(base), Path(scratch), loss, trainer=options).train_dataset
        found |= {name: list(rows[name]) for name in rows.column_names if name.startswith("ref_")}
    return found


def columns_of_a_process(rank: int, base: str, out: str, port: int) -> None:
    """What one of two processes has; each writes its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    (Path(out) / f"{rank}.json").write_text(json.dumps(columns(base, out)))
    torch.distributed.destroy_process_group()
