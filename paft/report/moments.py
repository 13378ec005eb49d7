"""Sums over the entries of a delta, and the measures that follow from them.

For a LoRA module with factors A [r, n], B [m, r] and scale s the delta δ = B·A has N = m·n entries; a merge adds s·δ.

    share        |{ |δ| < t }| / N, t = 1e-5      PAFT (arXiv 2406.17923, Figure 2); depends on the learning rate
    share scaled |{ |s·δ| < t }| / N               the same of what a merge adds
    Gaussian share  erf(t / (rms·√2))              what a dense Gaussian delta of the same rms would show
    Hoyer        (√N - L1/L2) / (√N - 1)           0 = all equal, 1 = one entry; Gaussian 1-√(2/π) = 0.202
    N_eff/N      (Σ|δ|)² / (N·Σδ²)                 effective share of entries in use; Gaussian 2/π = 0.637

rms, max, L1 and the Frobenius norm are those of s·δ. Hoyer and N_eff/N do not change when δ is rescaled (for large N,
Hoyer is 1 - √(N_eff/N)). A product of Gaussian factors is less even than a Gaussian: N_eff/N is (2/π)² = 0.405 at
rank 1 and nears 2/π as r grows.

The delta is never built: rows of B times A, one tile at a time, all in float64, so counts and sums do not depend on
the tile. In float64 a product of float32 factors neither overflows nor underflows, and it costs no more than float32
with float64 sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

GAUSSIAN_HOYER = 1 - math.sqrt(2 / math.pi)
GAUSSIAN_N_EFF = 2 / math.pi
_TILE_ENTRIES = 1 << 18


class FactorsLike(Protocol):
    """One LoRA module: ``A`` [r, n], ``B`` [m, r] and the scale s of s·B·A."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...


@dataclass(frozen=True)
class Moments:
    """Sums over entries from which every measure follows; ``a + b`` pools two sets of entries.

    Counts ``below`` (|δ| < t), ``below_scaled`` (|s·δ| < t), ``zeros`` (δ = 0 exactly) and ``entries``; ``expected``
    and ``expected_scaled`` are the counts below t of Gaussian tensors with the same rms each; ``l1``, ``sumsq``,
    ``max`` are of s·δ.
    """

    entries: int
    below: int
    below_scaled: int
    zeros: int
    expected: float
    expected_scaled: float
    l1: float
    sumsq: float
    max: float

    def __add__(self, other: Moments) -> Moments:
        pooled: dict[str, Any] = {key: value + getattr(other, key) for key, value in vars(self).items()}
        pooled["max"] = max(self.max, other.max)
        return Moments(**pooled)

    @property
    def share(self) -> float:
        return self.below / self.entries

    @property
    def share_scaled(self) -> float:
        return self.below_scaled / self.entries

    @property
    def rms(self) -> float:
        return math.sqrt(self.sumsq / self.entries)

    @property
    def frobenius(self) -> float:
        return math.sqrt(self.sumsq)

    @property
    def hoyer(self) -> float | None:
        """None where it is not defined: a zero delta, or a single entry."""
        if not self.sumsq or self.entries == 1:
            return None
        root = math.sqrt(self.entries)
        return (root - self.l1 / self.frobenius) / (root - 1)

    @property
    def n_eff(self) -> float | None:
        """N_eff/N; None for a zero delta."""
        return (self.l1 / self.frobenius) ** 2 / self.entries if self.sumsq else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "entries": self.entries,
            "share_unscaled": self.share,
            "share_scaled": self.share_scaled,
            "gaussian_share_unscaled": self.expected / self.entries,
            "gaussian_share_scaled": self.expected_scaled / self.entries,
            "zeros": self.zeros,
            "rms": self.rms,
            "max": self.max,
            "frobenius": self.frobenius,
            "l1": self.l1,
            "hoyer": self.hoyer,
            "n_eff": self.n_eff,
        }


def measure(factors: FactorsLike, threshold: float, tile_rows: int | None = None) -> Moments:
    """Moments of one module in one pass over row tiles (by default of 2 MB); ``factors`` must be finite."""
    scale = abs(float(factors.scale))
    scaled_threshold = threshold / scale if scale else math.inf
    entries = below = below_scaled = nonzero = 0
    l1 = sumsq = largest = 0.0
    for tile in _tiles(factors, tile_rows):
        entries += tile.numel()
        below += int((tile < threshold).sum())
        below_scaled += int((tile < scaled_threshold).sum())
        nonzero += int(tile.count_nonzero())
        l1 += float(tile.sum())
        sumsq += float(tile @ tile)
        largest = max(largest, float(tile.max()))
    rms = math.sqrt(sumsq / entries)
    return Moments(
        entries=entries,
        below=below,
        below_scaled=below_scaled,
        zeros=entries - nonzero,
        expected=entries * _gaussian_share(rms, threshold),
        expected_scaled=entries * _gaussian_share(rms, scaled_threshold),
        l1=l1 * scale,
        sumsq=sumsq * scale * scale,
        max=largest * scale,
    )


def _tiles(factors: FactorsLike, tile_rows: int | None) -> Iterator[Tensor]:
    """Yield |B·A| in float64, some whole rows at a time, flat."""
    a = factors.A.detach().cpu().double()
    for rows in factors.B.detach().cpu().split(tile_rows or max(1, _TILE_ENTRIES // a.shape[1])):
        yield (rows.double() @ a).abs_().flatten()


def _gaussian_share(rms: float, threshold: float) -> float:
    """P(|x| < t) for a Gaussian x of this rms."""
    return math.erf(threshold / (rms * math.sqrt(2))) if rms else 1.0
