"""About how long a training takes on this machine: what `--dry-run` says, right to a factor of two or so.

    seconds = steps · tokens a step · parameters · FLOP a token and parameter / FLOP a second

FLOP a token and parameter: 2 forward, 2 back to the factors, 2 for the weights' own gradients (full fine-tuning), 2 for
activations computed again (gradient checkpointing), and 2 for the reference of a preference loss. FLOP a second are measured
with a few matrix products, of which a training reaches about half. Tokens are the mean of the first rows, as the trainer
renders them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from paft.data import Row
from paft.models import device, parameters
from paft.recipe import JointRecipe, PreferenceRecipe, TrainRecipe
from paft.train import losses
from paft.train.rendering import render
from paft.train.schedules import SCHEDULES

HEAD = 64  # rows that are rendered
REACHED = 0.5  # of the rate of plain matrix products
OVERHEAD = 0.02  # seconds a step


def seconds(recipe: TrainRecipe, base: Path, tokenizer: Any, rows: Mapping[str, Sequence[Row]], args: Any, steps: int) -> float:
    """Seconds of training, without loading and evaluation; 0 where the steps are not known."""
    limit = args.max_length or 1 << 30
    sets = {name: found for name, found in rows.items() if found and not name.endswith("eval")}
    mean = {name: _mean_tokens(recipe, tokenizer, found, limit) for name, found in sets.items()}
    extra = 2 * bool(recipe.full) + 2 * bool(args.gradient_checkpointing)
    work = {name: tokens * (4 + extra + 2 * _has_reference(recipe, name)) for name, tokens in mean.items()}
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    step = sum(share * work[name] for name, share in _shares(recipe, work, args.per_device_train_batch_size).items())
    step *= size * parameters(base)
    return steps * (step / (REACHED * _rate()) + OVERHEAD)


def answering(base: Path, read: float, written: float, steps: float) -> float:
    """Seconds in which a model reads so many tokens without learning, and writes others in so many steps."""
    return 2 * (read + written) * parameters(base) / (REACHED * _rate()) + OVERHEAD * steps


def _mean_tokens(recipe: TrainRecipe, tokenizer: Any, rows: Sequence[Row], limit: int) -> float:
    """Of a row of a batch; UFT, which mixes its rows by kind, counts either answer of a pair as a row."""
    rendered = render(tokenizer, list(islice(iter(rows), HEAD)), recipe)
    head = [[min(sequence.length, limit) for sequence in row] for row in rendered]
    apart = isinstance(recipe, JointRecipe) and recipe.method not in SCHEDULES
    return sum(map(sum, head)) / (sum(map(len, head)) if apart else len(head))


def _has_reference(recipe: TrainRecipe, name: str) -> bool:
    return name != "sft" and isinstance(recipe, PreferenceRecipe) and losses.family(recipe).reference


def _shares(recipe: TrainRecipe, work: Mapping[str, float], size: int) -> dict[str, float]:
    """Batches of ``size`` rows of each set in a step; of two sets λ is taken for pairs, and Mix takes a batch of either."""
    if not isinstance(recipe, JointRecipe):
        return dict.fromkeys(work, 1.0)
    scheduled = recipe.method in SCHEDULES
    both = scheduled and SCHEDULES[recipe.method](recipe, 1).together > 1
    wider = (recipe.sft_batch_size or size) / size if scheduled else 1.0
    return {"pref": 1.0 if both else recipe.lam, "sft": wider * (1.0 if both else 1 - recipe.lam)}


def _rate(size: int = 1024, rounds: int = 4) -> float:
    """FLOP a second of square matrix products in the type that a training computes in."""
    import torch

    cuda = device() == "cuda"
    a = torch.randn(4 * size if cuda else size, size, device=device(), dtype=torch.bfloat16 if cuda else torch.float32)
    b = torch.randn(size, size, device=device(), dtype=a.dtype)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        torch.mm(a, b)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * a.shape[0] * size * size / best
