"""The L1 term of one run: which λ holds at which step, who applies it, and what is told about it.

    λ_t = λ·min(1, t/W)        t optimiser steps done, W = ``l1_warmup`` steps (below 1: a share, as TRL's warmup_steps)

With a target the controller of `paft.train.target` moves λ. The state lies in the checkpoint, so that a resumed run goes on as
if it had not been cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from paft.train.gauge import Gauge, entry_gradient, gauge
from paft.train.l1 import Factors, lora_factors, penalty, whole
from paft.train.proximal import adaptive, proximal_step, settle, settled
from paft.train.target import START, interval, largest, moved, slack

if TYPE_CHECKING:
    from paft.recipe import TrainRecipe

FIELDS = ("l1", "l2", "l1_scaled", "l1_solver", "l1_warmup", "l1_target_sparsity")


class L1Term(TrainerCallback, ExportableState):
    """Follows a trainer's steps; `Penalised` asks it for the term of the loss and for the numbers of a log record.

    ``strength`` is λ before the warm-up, ``now`` the λ of this step. ``unit`` is the last estimate of rms(G), ``peak`` the
    largest; ``travel`` is Σ lr², see `reach`. ``clip`` is the factor by which the trainer clipped the last gradients.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.strength: float | None = options["l1"] if options["l1_target_sparsity"] is None else None
        self.now, self.clip = float(options["l1"]), 1.0
        self.unit = self.peak = self.travel = 0.0
        self.warmup = 0

    @classmethod
    def of(cls, recipe: TrainRecipe) -> L1Term:
        return cls(**{name: getattr(recipe, name) for name in FIELDS})

    def state(self) -> dict[str, Any]:
        kept = ("strength", "unit", "peak", "travel")
        return {"args": self.options, "attributes": {name: getattr(self, name) for name in kept}}

    @property
    def active(self) -> bool:
        return bool(self.options["l1"] or self.options["l1_target_sparsity"])

    @property
    def proximal(self) -> bool:
        return self.options["l1_solver"] == "proximal"

    @property
    def scaled(self) -> bool:
        return self.options["l1_scaled"]

    def in_loss(self) -> dict[str, float]:
        """The coefficients of what the loss of this step contains; empty values where the other solver, or nothing, acts."""
        return {"l1": 0.0 if self.proximal else self.now, "l2": self.options["l2"]}

    # What the trainer calls, in this order in every optimiser step.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        if kept.get("args") == self.options:
            for name, value in kept["attributes"].items():
                setattr(self, name, value)
        share = self.options["l1_warmup"]
        self.warmup = int(share) if share >= 1 else math.ceil(share * state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = (self.strength or 0.0) * min(1.0, state.global_step / max(1, self.warmup) if self.warmup else 1.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if not self.active or not self._due(state, state.global_step + 1):
            return
        self.unit = entry_gradient(self._task_gradients(model))
        self.peak = max(self.peak, self.unit)
        if self.strength is None and self.unit:
            self.strength = START * largest(self.peak, self.options["l1_target_sparsity"])
            self.on_step_begin(args, state, control)

    def _due(self, state: Any, step: int) -> bool:
        """Whether rms(G) of this step is wanted: for the first λ, for the controller, or for a log record."""
        every = interval(state.max_steps) if self.options["l1_target_sparsity"] else state.logging_steps
        return (self.strength is None) or step == 1 or step % every == 0 or step == state.max_steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        self.travel += max(group["lr"] for group in optimizer.param_groups) ** 2
        if self.active and self.proximal:
            act = settle if state.global_step + 1 == state.max_steps else proximal_step
            act(lora_factors(model), optimizer, self.now * self.clip, scaled=self.scaled)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, lr_scheduler: Any,
                    **kwargs: Any) -> None:
        target, step = self.options["l1_target_sparsity"], state.global_step
        if self.strength and target is not None and step > self.warmup and step % interval(state.max_steps) == 0:
            self.strength = moved(self.strength, self._share(model, optimizer, lr_scheduler, state), target, self.peak)

    def _share(self, model: Any, optimizer: Any, lr_scheduler: Any, state: Any) -> float:
        """The share that the controller steers by: what would be zero if the run ended here."""
        if self.proximal:
            return settled(lora_factors(model), optimizer, self.now * self.clip, scaled=self.scaled)
        swing = slack(lr_scheduler, state.max_steps) if adaptive(optimizer) else 0.0
        return gauge(model, scaled=self.scaled, slack=swing).below

    # What is told.

    def report(self, model: Any, optimizer: Any) -> dict[str, float]:
        """The numbers of a log record, as the adapter is now."""
        measured = gauge(model, scaled=self.scaled)
        found = {"l1": measured.l1, "l1_lambda": self.now, "share_below_1e-5": measured.below, "hoyer": measured.hoyer}
        if self.unit:
            found["l1_relative"] = self.now / self.unit
        if self.proximal:
            found |= {"share_zero": measured.zero, "zero_rows": measured.zero_rows, "zero_columns": measured.zero_columns,
                      "dead_ranks": measured.dead_ranks}
        if self.travel and adaptive(optimizer):
            found["l1_reach"] = self.reach(model, measured)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    @torch.no_grad()
    def reach(self, model: Any, measured: Gauge) -> float:
        """‖δ‖₂ in units of what noise alone would have made: |s|·√(m·Σ lr²)·‖A‖₂ over all layers.

        Adam divides by the size of the gradient, so gradients of pure noise make each entry of B a random walk with steps of lr.
        A trained adapter is above 1, a sparse one a little lower for the rows that rest; one that is held at zero is far below.
        """
        squares = [B.shape[0] * (s if self.scaled else 1.0) ** 2 * whole(A).float().square().sum()
                   for _, A, B, s in lora_factors(model)]
        square = torch.stack(squares).sum().item()
        return measured.l2 / math.sqrt(self.travel * square) if square else 0.0

    def _task_gradients(self, model: Any) -> Iterator[tuple[Factors, Tensor]]:
        """Each layer with ∂L_task/∂B: the clipped gradient, undone, less that of the penalty."""
        layers = [each for each in lora_factors(model) if each.B.grad is not None]
        if not layers or not any(self.in_loss().values()):
            yield from ((each, each.B.grad / self.clip) for each in layers)  # type: ignore[operator]
            return
        value, _ = penalty(model, **self.in_loss(), scaled=self.scaled)
        slopes = torch.autograd.grad(value, [each.B for each in layers])
        yield from ((each, each.B.grad / self.clip - slope) for each, slope in zip(layers, slopes, strict=True))  # type: ignore[operator]
