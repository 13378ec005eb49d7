"""NuSLERP: SLERP of deltas with mergekit's options, also for each row or column apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, combine_linearly, keep, row_sums, tiles
from paft.merge.sphere import PARALLEL, arc, directions, second_share


def nuslerp(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Plan:
    """SLERP as mergekit has it: also rows or columns apart.

        D = [sin((1-t)θ) δ₁ + sin(tθ) δ₂] / sin θ,   t = w₂ / (w₁ + w₂)

    δ_i: ΔW of adapter i [rows, columns], exactly two; w_i: its weight, 1 by default. θ is the angle between the whole
    deltas, which is ``slerp``; with ``nuslerp_flatten=false`` each row has its own, or with ``nuslerp_row_wise`` too
    (mergekit's name) each column. Flattened, the result is linear in the deltas: exactly a LoRA of rank Σr.

    Parallel and opposite vectors (1 - cos²θ ≤ 1e-12; 1e-16 in mergekit) and zeros are interpolated linearly. mergekit
    takes a zero for a right angle, so that at t = 0.5 a tensor which one adapter alone touches comes out 1.41 times
    as strong. PEFT has no SLERP. Raises UsageError for another number of adapters, t outside [0, 1], weights that sum
    to zero (t = 0.5 in mergekit), or ``nuslerp_row_wise`` of flattened deltas, which mergekit ignores.

    Source: mergekit's ``nuslerp`` with a base.
    """
    t = second_share("nuslerp", weights)
    if nuslerp_flatten:
        if nuslerp_row_wise:
            raise UsageError("nuslerp_row_wise has no effect on flattened deltas", hint="set nuslerp_flatten=false")
        norms, cosines = directions(deltas)
        return combine_linearly(arc(t, cosines[0][1] if all(norms) else 1.0))
    columns = _arcs(t, *_column_products(deltas[0], deltas[1])) if nuslerp_row_wise else None

    def combine(parts: list[torch.Tensor], start: int) -> torch.Tensor:
        first, second = parts
        a, b = columns if columns else _arcs(t, *(row_sums(value)[:, None] for value in _products(first, second)))
        return first * a.to(first.dtype) + second * b.to(first.dtype)

    return Plan([keep, keep], combine)


def _products(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = first.double(), second.double()
    return x * y, x * x, y * y


def _column_products(first: Tiled, second: Tiled) -> torch.Tensor:
    """⟨x, y⟩, ⟨x, x⟩ and ⟨y, y⟩ of each column, [3, columns], added row after row so that tiles change nothing."""
    sums = torch.zeros(3, first.columns, dtype=torch.float64)
    for start, tile in tiles(first):
        for row in torch.stack(_products(tile, second.tile(start, start + len(tile))), dim=1):
            sums += row
    return sums


def _arcs(t: float, inner: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`sphere.arc` of many vectors at once."""
    size = (first * second).sqrt()
    cosine = torch.where(size > 0, inner / torch.where(size > 0, size, 1), 1).clamp(-1, 1)
    flat = (cosine.abs() > PARALLEL) | (t in (0, 1))
    angle = torch.where(flat, 1, cosine.acos())
    ends = [torch.where(flat, share, (share * angle).sin() / angle.sin()) for share in (1 - t, t)]
    return ends[0], ends[1]
