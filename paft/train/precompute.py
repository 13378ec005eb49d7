"""log π_ref of every row, computed once: one pass over the data in place of one forward pass of the reference in each step."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from paft.errors import UsageError
from paft.progress import Progress


def precompute(trainer: Any, asked: bool | None, *, share: float = 1.0, quiet: bool = False) -> bool:
    """Give the trainer's rows their reference log-probabilities, if ``asked``, or if None where it saves work; returns whether.

    It saves work when the training, ``share`` of whose batches hold pairs, reads a row more than once; a second model leaves the
    memory afterwards, so that with one a single full pass is reason enough. It is sound where the reference is fixed and the rows
    can be counted: not for streamed rows, and not under FSDP or DeepSpeed, where the model is not whole before the training;
    asked for there, it is a UsageError.

    TRL's own ``precompute_ref_log_probs`` runs before a reference adapter can be laid on the model, and keeps its numbers in a
    file beside the data's in the user's cache (for rows in memory, in a temporary file of each process, so that it fails on
    several). Here they become columns of the rows in memory, so that none is left over or stale. They are what the trainer's
    ``compute_ref_log_probs`` says, and differ from those of a step by the rounding of other padding.
    """
    obstacle = _obstacle(trainer)
    if asked and obstacle:
        raise UsageError(f"trainer.precompute_ref_log_probs is not possible {obstacle}", hint="leave it out")
    if obstacle or not (_pays(trainer, share) if asked is None else asked):
        return False
    args = trainer.args
    for name, size in (("train_dataset", args.per_device_train_batch_size), ("eval_dataset", args.per_device_eval_batch_size)):
        rows = getattr(trainer, name)
        if rows is not None:
            setattr(trainer, name, _with_columns(trainer, rows, args.precompute_ref_batch_size or size, quiet))
    trainer.precompute_ref_logps = True
    trainer.ref_model = None
    return True


def _obstacle(trainer: Any) -> str | None:
    if not isinstance(trainer.train_dataset, Dataset):
        return "for streamed rows"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "under FSDP or DeepSpeed: the model is not whole before the training"
    return None


def _pays(trainer: Any, share: float) -> bool:
    args, rows = trainer.args, len(trainer.train_dataset)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    read = share * (args.max_steps * step if args.max_steps > 0 else args.num_train_epochs * rows)
    return read > rows or (read >= rows and trainer.ref_model is not None)


def _with_columns(trainer: Any, rows: Dataset, size: int, quiet: bool) -> Dataset:
    model = trainer.ref_model or trainer.model
    model.eval()  # as a step does for a model of its own; the Trainer sets its mode again before each step
    loader = trainer.accelerator.prepare(DataLoader(rows, batch_size=size, collate_fn=trainer.data_collator))  # type: ignore[arg-type]
    found: list[list[torch.Tensor]] = [[] for _ in trainer.reference_columns]
    with Progress("reference", len(loader), quiet=quiet) as show:
        for done, batch in enumerate(loader, 1):
            for column, values in zip(found, trainer.compute_ref_log_probs(model, batch), strict=True):
                if values is not None:  # KTO without its KL term
                    column.append(trainer.accelerator.gather_for_metrics(values).float().cpu())
            show(done)
    for name, column in zip(trainer.reference_columns, found, strict=True):
        if column:
            rows = rows.add_column(name, torch.cat(column).tolist())  # type: ignore[call-arg]
    return rows
