"""Singular values of a delta, from r x r Gram matrices of its factors or from the Gram matrix of its columns.

    σ²(B·A) = eig( G_A^{1/2} · BᵀB · G_A^{1/2} ),   G_A = A·Aᵀ     [r, r], so no pass over the delta

    spectral norm   max σ
    stable rank     Σσ² / max σ²                 at most the rank; 1 where one direction holds all
    effective rank  exp(-Σ p log p), p = σ/Σσ    (Roy & Vetterli 2007)
    dead ranks      ranks k with B[:, k] = 0 or A[k, :] = 0: they add nothing

In float64; singular values below 1e-8 of the largest are noise, which moves neither rank. A delta that is no product is read
by row tiles if it has at most 2048 columns and rows·columns² is at most 2·10¹⁰ (a second or so): its Gram matrix is
[columns, columns]. Of larger ones nothing is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from paft.report.reference import random_ranks, ranks
from paft.report.sources import Pair, Part

WIDEST, DEAREST = 2048, 2e10


@dataclass(frozen=True)
class Spectrum:
    """``rank``: number of factors' ranks (None where δ is no product); ``values``: singular values of s·δ, largest first."""

    rank: int | None
    dead: int
    values: tuple[float, ...]
    random: tuple[float, float]

    @property
    def frobenius(self) -> float:
        return math.sqrt(math.fsum(value * value for value in self.values))

    @property
    def spectral(self) -> float:
        return self.values[0] if self.values else 0.0

    @property
    def stable(self) -> float:
        return ranks(np.array(self.values))[0]

    @property
    def effective(self) -> float:
        return ranks(np.array(self.values))[1]

    def to_dict(self) -> dict[str, float | int | None]:
        return {"rank": self.rank, "dead_ranks": self.dead, "spectral": self.spectral, "stable_rank": self.stable,
                "effective_rank": self.effective, "random_stable_rank": self.random[0], "random_effective_rank": self.random[1]}


def spectrum(part: Part) -> Spectrum | None:
    """The singular values of one part; None where they would take too large a Gram matrix."""
    pair = part.factors()
    if pair is not None:
        return of_factors(pair, part.scale)
    if part.columns > WIDEST or part.entries * part.columns > DEAREST or part.rows == 1:
        return None
    gram = torch.zeros(part.columns, part.columns, dtype=torch.float64)
    for _, _, block in part.blocks():
        tile = torch.from_numpy(block).double()
        gram += tile.T @ tile
    values = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_().flip(0)[: min(part.rows, part.columns)]
    return Spectrum(None, 0, tuple(values.tolist()), random_ranks(part.rows, part.columns, None))


def of_factors(pair: Pair, scale: float) -> Spectrum:
    """From factors in float64, each first divided by its largest entry, so that squares neither overflow nor vanish."""
    left, right = pair
    rank = left.shape[1]
    sizes = [float(factor.abs().max()) or 1.0 for factor in pair]
    left, right = left / sizes[0], right / sizes[1]
    outer, vectors = torch.linalg.eigh(right @ right.T)
    root = vectors * outer.clamp(min=0).sqrt()
    values = torch.linalg.eigvalsh(root.T @ (left.T @ left) @ root).clamp_(min=0).sqrt_().flip(0)
    dead = int(((left == 0).all(dim=0) | (right == 0).all(dim=1)).sum())
    values = values[: min(left.shape[0], right.shape[1])] * (sizes[0] * sizes[1] * abs(scale))
    return Spectrum(rank, dead, tuple(values.tolist()), random_ranks(left.shape[0], right.shape[1], rank))
