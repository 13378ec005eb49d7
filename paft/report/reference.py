"""What a delta whose entries are independent Gaussian or Laplace numbers would show in each scale-free measure.

                Gaussian                     Laplace
    Hoyer       1 - √(2/π)       = 0.202     1 - 1/√2   = 0.293      (for N → ∞)
    N_eff/N     2/π              = 0.637     1/2
    Gini        √2 - 1           = 0.414     1/2
    d90, d99    P(|x| > q), where q solves E[x²; |x| > q] = 0.9 E[x²]: 0.445, 0.735 and 0.332, 0.647

The ranks are those of a random matrix of the same shape and rank: what counts in them is the number of independent entries,
not their law, so Gaussian and Laplace factors have the same value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Reference:
    """The scale-free measures of one law."""

    name: str
    hoyer: float
    n_eff: float
    gini: float
    d90: float
    d99: float

    def to_dict(self) -> dict[str, float]:
        return {key: value for key, value in vars(self).items() if key != "name"}


def _solve(tail: float, energy: str) -> float:
    """P(|x| > q) at the q where the entries above it hold the share ``tail`` of the energy, by bisection."""
    def gaussian(q: float) -> float:
        return math.erfc(q / math.sqrt(2)) + q * math.sqrt(2 / math.pi) * math.exp(-q * q / 2)

    def laplace(q: float) -> float:
        return math.exp(-q) * (q * q / 2 + q + 1)

    held = {"gaussian": gaussian, "laplace": laplace}[energy]
    low, high = 0.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if held(middle) > tail else (low, middle)
    return math.erfc(low / math.sqrt(2)) if energy == "gaussian" else math.exp(-low)


GAUSSIAN = Reference("Gaussian", 1 - math.sqrt(2 / math.pi), 2 / math.pi, math.sqrt(2) - 1,
                     _solve(0.9, "gaussian"), _solve(0.99, "gaussian"))
LAPLACE = Reference("Laplace", 1 - math.sqrt(0.5), 0.5, 0.5, _solve(0.9, "laplace"), _solve(0.99, "laplace"))
_DRAWN = 192  # rows or columns of a drawn matrix; ranks of larger ones follow by proportion


def gaussian_share(rms: float, threshold: float) -> float:
    """P(|x| < t) for a Gaussian x of this rms."""
    return math.erf(threshold / (rms * math.sqrt(2))) if rms else 1.0


@lru_cache(maxsize=256)
def random_ranks(rows: int, columns: int, rank: int | None) -> tuple[float, float]:
    """(stable rank, effective rank) of one drawn product of Gaussian factors, or of a Gaussian matrix without ``rank``.

    A large matrix is drawn at the same proportions with its shorter side 192: both ranks grow with it.
    """
    random = np.random.default_rng(0)
    if rank is not None:
        left, right = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
        return ranks(np.sqrt(np.clip(np.linalg.eigvals((left.T @ left) @ (right @ right.T)).real, 0, None)))
    short, long = sorted((rows, columns))
    shrink = max(1.0, short / _DRAWN)
    drawn = random.standard_normal((round(short / shrink), min(round(long / shrink), 1 << 16)))
    stable, effective = ranks(np.sqrt(np.linalg.eigvalsh(drawn @ drawn.T).clip(0)))
    return stable * shrink, effective * shrink


def ranks(values: np.ndarray) -> tuple[float, float]:
    """Stable rank Σσ² / max σ², and effective rank exp(-Σ p log p), p = σ/Σσ (Roy & Vetterli 2007); 0 of a zero matrix."""
    if not len(values) or not values.max():
        return 0.0, 0.0
    values = values / values.max()
    shares = values[values > 0] / values.sum()
    return float((values**2).sum()), float(np.exp(-(shares * np.log(shares)).sum()))
