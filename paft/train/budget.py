"""How long a joint training is, and the learning rate over it.

A budget is a number of optimiser steps T, or of tokens. Without one, T is what SFT and preference training one after the other
would take for ``num_train_epochs``; for a method that computes both objectives in each step, half of that: the same rows.

With a budget of tokens T is a bound, which the cheapest steps would need, the learning rate follows the share of the tokens
that is spent, and the training ends with the step that spends them all. A schedule of several phases has to know its T
before, so there T is what tokens a step are expected to take, and the learning rate follows the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from paft.errors import UsageError
from paft.train.batches import no_batch
from paft.train.schedules import SCHEDULES

if TYPE_CHECKING:
    from paft.recipe import JointRecipe

Rate = Callable[[int], float]
SLACK = 1.1  # the bound of a budget of tokens, above the mean


def check(recipe: JointRecipe) -> None:
    """UsageError for two budgets, and for what needs to know its number of steps under one of tokens."""
    if recipe.max_tokens and recipe.trainer.get("max_steps", -1) > 0:
        raise UsageError(f"max_tokens is {recipe.max_tokens}, and trainer.max_steps {recipe.trainer['max_steps']}: one budget",
                         hint="--set trainer.max_steps=-1, or leave max_tokens out")
    if recipe.max_tokens and 0 < recipe.l1_warmup < 1:
        raise UsageError(f"l1_warmup is a share of the steps ({recipe.l1_warmup:g}), and a budget of tokens leaves them open",
                         hint="say it in steps, for example --l1-warmup 50")


def steps(recipe: JointRecipe, trainer: Any) -> int:
    """T of a trainer that has its data; UsageError where the rows would have to be counted and are streamed."""
    kind = SCHEDULES[recipe.method](recipe, 1)
    if recipe.max_tokens:
        shares = {"dpo": recipe.lam, "sft": 1 - recipe.lam} if len(kind.phases) > 1 else None
        return _of_tokens(recipe.max_tokens, trainer.tokens_a_step(), kind.together, shares)
    return _of_passes(trainer.args, {name: len(each) for name, each in trainer.batches.items()}, kind.together)


def foreseen(recipe: JointRecipe, args: Any, rows: Mapping[str, Sized]) -> int:
    """T before any row is rendered, where none is dropped; 0 for a budget of tokens, since they are not counted yet."""
    sizes = {"pref": args.per_device_train_batch_size, "sft": recipe.sft_batch_size or args.per_device_train_batch_size}
    passes = {name: _batches(args, len(rows[name]), size) for name, size in sizes.items()}
    return 0 if recipe.max_tokens else _of_passes(args, passes, SCHEDULES[recipe.method](recipe, 1).together)


def of_epochs(args: Any, rows: int) -> int:
    """Optimiser steps, as `Trainer` counts them where no row is dropped or packed."""
    if args.max_steps > 0:
        return args.max_steps
    batches = _batches(args, rows, args.per_device_train_batch_size)
    return math.ceil(max(1, math.ceil(batches / args.gradient_accumulation_steps)) * args.num_train_epochs)


def _batches(args: Any, rows: int, size: int) -> int:
    return (math.floor if args.dataloader_drop_last else math.ceil)(rows / size)


def _of_passes(args: Any, passes: Mapping[str, int], together: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    if not all(passes.values()):
        if args.dataloader_drop_last:
            raise no_batch()
        raise UsageError("a stream has no end that is known: it needs trainer.max_steps", hint="--set trainer.max_steps=1000")
    each = [math.ceil(length / args.gradient_accumulation_steps) for length in passes.values()]
    return math.ceil(args.num_train_epochs * sum(each) / together)


def bound(tokens: int, cost: float) -> int:
    """Steps that are enough to spend ``tokens``, where the cheapest take ``cost`` of them in the mean."""
    return max(1, math.ceil(SLACK * tokens / cost))


def _of_tokens(tokens: int, cost: Mapping[str, float], together: int, shares: Mapping[str, float] | None) -> int:
    if shares is not None:
        return max(1, round(tokens / sum(shares[name] * cost[name] for name in cost)))
    return bound(tokens, sum(cost.values()) if together > 1 else min(cost.values()))


def scheduler(args: Any, optimizer: Any, phases: Sequence[int], clock: Callable[[int], float] | None = None) -> LambdaLR:
    """A learning-rate schedule of the trainer's type for each phase, one after the other, each with its own warm-up.

    ``clock`` turns the step into the time, in steps, that the rate is read at. UsageError for a type that is no function of it.
    """
    rates = [_rate(args, length) for length in phases]

    def rate(step: int) -> float:
        at = int(clock(step)) if clock else step
        for length, each in zip(phases[:-1], rates[:-1], strict=True):
            if at < length:
                return each(at)
            at -= length
        return rates[-1](at)

    return LambdaLR(getattr(optimizer, "optimizer", optimizer), rate)


def _rate(args: Any, steps: int) -> Rate:
    alone = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    found = get_scheduler(args.lr_scheduler_type, optimizer=alone, num_warmup_steps=args.get_warmup_steps(steps),
                          num_training_steps=steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    if not isinstance(found, LambdaLR):
        raise UsageError(f"trainer.lr_scheduler_type {args.lr_scheduler_type} does not go with phases or a budget of tokens",
                         hint="use cosine, linear or constant")
    return found.lr_lambdas[0]
