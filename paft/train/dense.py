"""Full fine-tuning's penalty: δ = θ − θ_pre over every trained parameter.

    L = L_task + l1·Σ_i |θ_i − θ_pre,i| + l2·½·Σ_i (θ_i − θ_pre,i)²        ∂/∂θ = l1·sign(θ − θ_pre) + l2·(θ − θ_pre)

θ_pre is not kept in memory: it is read from the base's files, tile by tile, once for the value and once for the gradient (from
the system's cache, as a rule). Neither TRL nor PEFT has such a term; PAFT (arXiv 2406.17923, eq. 1) writes it for adapters, and
for θ it is the same sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paft.checkpoint import Checkpoint
from paft.naming import Names

TILE = 1 << 20  # entries read at a time: 4 MB


class Start:
    """θ_pre on the disk, by the names of the live model's parameters.

    Raises MismatchError for a parameter that the base's files store in another layout (the experts of some mixtures).
    """

    def __init__(self, base: Path, model: torch.nn.Module) -> None:
        self.files = Checkpoint.open(base)
        names = Names(self.files, base.name, None)
        found = {name: names.find(name) for name, _ in model.named_parameters()}
        self.stored = {name: names.stored_as(each) or each for name, each in found.items()}  # a tied head has its embedding's

    def tiles(self, name: str, theta: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, θ − θ_pre) of a parameter seen as a matrix, in float32 (float64 for float64)."""
        entry = self.files.entries[self.stored[name]]
        kind = torch.float64 if theta.dtype == torch.float64 else torch.float32
        flat, step = theta.detach().view(entry.rows, entry.columns), max(1, TILE // entry.columns)
        for first in range(0, entry.rows, step):
            rows = slice(first, min(first + step, entry.rows))
            before = self.files.tile(entry.name, rows.start, rows.stop).to(theta.device, kind)
            yield rows, flat[rows].to(kind) - before

    def penalty(self, model: torch.nn.Module, *, l1: float, l2: float) -> tuple[Tensor, Tensor]:
        """(l1·‖δ‖₁ + l2·½‖δ‖², ‖δ‖₁), the first differentiable in every trained parameter."""
        terms, sizes = zip(*(_Penalty.apply(theta, name, self, l1, l2) for name, theta in model.named_parameters()
                             if theta.requires_grad), strict=True)
        return torch.stack(terms).sum(), torch.stack(sizes).detach().sum()

    @torch.no_grad()
    def measure(self, model: torch.nn.Module, threshold: float = 1e-5) -> dict[str, float]:
        """‖δ‖₁, and the shares of all entries with |δ| < threshold and with δ = 0."""
        size, below, zero, entries = 0.0, 0, 0, 0
        for name, theta in model.named_parameters():
            for _, tile in self.tiles(name, theta):
                size += tile.abs().sum(dtype=torch.float64).item()
                below += int((tile.abs() < threshold).sum())
                zero += int((tile == 0).sum())
            entries += theta.numel()
        return {"l1": size, "share_below_1e-5": below / max(entries, 1), "share_zero": zero / max(entries, 1)}


class _Penalty(torch.autograd.Function):
    """(l1·Σ|δ| + l2·½Σδ², Σ|δ|) of one parameter."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, name: str, start: Start, l1: float, l2: float) -> tuple[Tensor, Tensor]:
        size, square = (torch.zeros((), dtype=torch.float64 if theta.device.type == "cpu" else None) for _ in range(2))
        for _, tile in start.tiles(name, theta):
            size = size + torch.linalg.vector_norm(tile, 1)
            square = square + tile.square().sum()
        ctx.save_for_backward(theta)
        ctx.rest = name, start, l1, l2
        kind = torch.float64 if theta.dtype == torch.float64 else torch.float32
        return (l1 * size + 0.5 * l2 * square).to(kind), size.to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        theta, (name, start, l1, l2) = ctx.saved_tensors[0], ctx.rest
        slope = torch.empty_like(theta)
        for rows, tile in start.tiles(name, theta):
            slope.view(-1, tile.shape[1])[rows] = grad * (l1 * tile.sign() + l2 * tile)
        return slope, None, None, None, None


class Dense:
    """Mix in before a penalised trainer of a whole model, and set ``start``: the penalty and its log speak of θ − θ_pre."""

    start: Start
    term: Any
    model: Any

    def _measured(self) -> tuple[Tensor, Tensor]:
        return self.start.penalty(self.model, **self.term.in_loss())

    def sparsity(self) -> dict[str, float]:
        """What the log says of the L1 term, for the model as it is now; nothing without the term."""
        return {**self.start.measure(self.model), "l1_lambda": self.term.now} if self.term.active else {}


def dense(kind: type) -> Any:
    """The trainer class ``kind``, with the penalty of a whole model."""
    return type(f"Dense{kind.__name__}", (Dense, kind), {})
