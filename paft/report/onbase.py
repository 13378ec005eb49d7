"""A delta beside the weights that it changes: its relative size, and what the rounding of W + s·δ leaves of it.

    invisible   |{ round(W + s·δ) = W }| / N         entries that the merged model, in the base's type, does not show
    landed      Σ (s·δ)² over the others / Σ (s·δ)²  the energy that arrives
    one step    of the entries that differ in a model stored in 16 bits, those at most one step of that type away from W

The last is for fine-tuned models: what a small learning rate moves by less than half a step is rounded away, so zeros in
their delta tell of the type and the learning rate (arXiv 2602.03839), not of the training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from paft.delta import spans
from paft.merge.select import FUSED_FROM
from paft.report.sources import Part

_MANTISSA = {"BF16": 8, "F16": 11}  # significant bits


@dataclass(frozen=True)
class OnBase:
    """Sums over the entries of a delta on its base; ``a + b`` pools two.

    ``weight_sumsq`` Σ W²; ``invisible`` and ``landed`` (Σ (s·δ)² of the visible) as above; ``energy`` Σ (s·δ)². Of models
    stored in 16 bits ``moved`` counts entries with δ ≠ 0, ``one_step`` those of them at most one step away; 0 of all else.
    """

    weight_sumsq: float
    invisible: int
    energy: float
    landed: float
    moved: int
    one_step: int

    def __add__(self, other: OnBase) -> OnBase:
        return OnBase(*(value + getattr(other, key) for key, value in vars(self).items()))


def beside_base(part: Part) -> OnBase | None:
    """One more pass over a part's row tiles, in float32 as a merge computes them; None where the base is not there."""
    if part.weight is None:
        return None
    checkpoint, name = part.weight
    tensor, found = part.tiled(), OnBase(0.0, 0, 0.0, 0.0, 0, 0)
    for start, stop in spans(tensor):
        found += _tile(tensor.tile(start, stop), checkpoint.tile(name, start, stop), part.stored)
    return found


def _tile(delta: torch.Tensor, weight: torch.Tensor, stored: str | None) -> OnBase:
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    moved = step = 0
    if stored in _MANTISSA:  # neighbours of |w| in [2^(e-1), 2^e) are 2^(e - bits) away
        wide = weight.float()
        spacing = torch.ldexp((wide != 0).float(), torch.frexp(wide).exponent - _MANTISSA[stored])
        moved, step = int((delta != 0).sum()), int(((delta != 0) & (delta.abs() <= spacing)).sum())
    visible, energy, landed = _rounded(delta, weight)
    return OnBase(size, delta.numel() - visible, energy, landed, moved, step)


def _rounded(delta: torch.Tensor, weight: torch.Tensor) -> tuple[int, float, float]:
    """(entries that the rounding leaves changed, energy of all, energy of these); compiled for the usual types."""
    if delta.numel() >= FUSED_FROM and weight.dtype in (torch.bfloat16, torch.float32):
        from paft.merge.rounding import add_bf16, add_f32

        counts, sums = np.zeros(2, np.int64), np.empty((len(delta), 3))
        narrow = weight.dtype == torch.bfloat16
        (add_bf16 if narrow else add_f32)(delta.numpy(), (weight.view(torch.uint16) if narrow else weight).numpy(), counts, sums)
        return int(counts[1]), float(sums[:, 0].sum()), float(sums[:, 1].sum())
    landed = (weight.float() + delta).to(weight.dtype) != weight
    square = delta.double().square()
    return int(landed.sum()), float(square.sum()), float(square[landed].sum())
