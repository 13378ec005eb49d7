"""What an adapter is while it trains: how large, how sparse, and how λ compares with the gradient of one weight entry.

All numbers are over all entries of all trained layers, with δ = s·B·A (or B·A, see `penalty`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from paft.train.l1 import Factors, accurate, lora_factors, product_half_square, tiles, whole


class Gauge(NamedTuple):
    """``l1`` = ‖δ‖₁, ``l2`` = ‖δ‖₂ and shares of all entries.

    ``below`` counts |δ| < threshold (PAFT's sparsity; it depends on the learning rate), ``zero`` the entries that are exactly
    zero because their row of B or their column of A is. ``zero_rows`` and ``zero_columns`` are shares of all such groups;
    ``dead_ranks`` counts the ranks k with B[:, k] = 0 and A[k] = 0, which no gradient can move again.
    """

    entries: int
    l1: float
    l2: float
    below: float
    zero: float
    zero_rows: float
    zero_columns: float
    dead_ranks: int

    @property
    def hoyer(self) -> float:
        """(√N - ‖δ‖₁/‖δ‖₂)/(√N - 1): 0 for equal entries, .20 for Gaussian ones, 1 for a single one; NaN for δ = 0."""
        root = math.sqrt(self.entries)
        return (root - self.l1 / self.l2) / (root - 1) if self.l2 and self.entries > 1 else math.nan


@torch.no_grad()
def gauge(model: torch.nn.Module, threshold: float = 1e-5, *, scaled: bool = True, slack: float = 0.0) -> Gauge:
    """Measure the trained adapter in one pass over tiles; ``slack`` raises the threshold of column j by slack·|s|·‖A_j‖₂."""
    found = [_layer(factors, threshold, scaled, slack) for factors in lora_factors(model)]
    if not found:
        return Gauge(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    sums = torch.stack([each.to(found[0].device) for each in found]).sum(0).tolist()
    entries, l1, square, below, zero, rows, zero_rows, columns, zero_columns, dead = sums
    return Gauge(int(entries), l1, math.sqrt(max(square, 0.0)), below / entries, zero / entries, zero_rows / rows,
                 zero_columns / columns, int(dead))


def _layer(factors: Factors, threshold: float, scaled: bool, slack: float) -> Tensor:
    """The ten numbers that `gauge` sums, as a tensor on the device: one transfer at the end, not one per number."""
    s = abs(factors.scale) if scaled else 1.0
    a, b = accurate(whole(factors.A)), accurate(whole(factors.B))
    bound = threshold / s + slack * torch.linalg.vector_norm(a, dim=0)
    l1, below = a.new_zeros((), dtype=torch.float64), a.new_zeros((), dtype=torch.float64)
    for part in tiles(b.shape[0], a.shape[1], a.device):
        tile = (b[part] @ a).abs_()
        l1 += tile.sum(dtype=torch.float64)
        below += (tile < bound).sum()
    no_row, no_column = (b == 0).all(1), (a == 0).all(0)
    dead = ((b == 0).all(0) & (a == 0).all(1)).sum()
    square = 2 * s**2 * product_half_square(a.double(), b.double())
    m, n, rows, columns = len(no_row), len(no_column), no_row.sum(), no_column.sum()
    zero = m * n - (m - rows) * (n - columns)
    sizes = l1.new_tensor([m * n, m, n])
    return torch.stack([sizes[0], s * l1, square, below, zero, sizes[1], rows, sizes[2], columns, dead])


def entry_gradient(layers: Iterable[tuple[Factors, Tensor]]) -> float:
    """Estimate the root mean square of ∂L/∂W over all entries from the gradients of B: the unit of a relative λ.

        ∂L/∂B = s·G·Aᵀ with G = ∂L/∂W (m x n),   so   ‖G‖² ≈ n·‖∂L/∂B‖² / (s²·‖A‖²)

    which is exact on average for an A of random directions, PEFT's start; in trainings of tiny models it stayed within 30 % of
    the truth. An embedding starts with A = 0 and tells nothing until its A has moved. ``layers`` pairs each layer with
    ∂L_task/∂B. An entry of δ can stay zero only while |G_ij| <= λ.
    """
    squares, entries = [], []
    for (_, A, B, s), grad in layers:
        a, g = accurate(whole(A.detach())), accurate(whole(grad))
        size = a.square().sum()
        squares.append(torch.where(size > 0, a.shape[1] * g.square().sum() / (s**2 * size), 0.0))
        entries.append((size > 0) * (B.shape[0] * A.shape[1]))
    if not squares:
        return 0.0
    square, count = torch.stack([torch.stack(squares).sum(), torch.stack(entries).sum()]).tolist()
    return math.sqrt(square / count) if count else 0.0
