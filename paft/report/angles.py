"""Principal angles between the row spaces, and the column spaces, of two low-rank deltas.

    cos θ_i = σ_i(Qᵀ P),   Q, P: orthonormal bases of the two spaces

Reported are the largest cosine and the mean of cos² over the min(r_a, r_b) angles, whose value for spaces in random position
is max(r_a, r_b) / dimension. The column space of s·B·A (what it can write into the output) is that of B, the row space (what
it reads of the input) that of Aᵀ, without directions whose singular value is below 1e-6 of the largest.
Source: Björck & Golub, Math. Comp. 27 (1973).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paft.errors import UsageError
from paft.report.sources import Pair, Part

_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Angles:
    """Of one pair of spaces: largest cosine, mean cos², and what random spaces of these dimensions have on average."""

    largest: float
    mean_square: float
    chance: float

    def to_dict(self) -> dict[str, float]:
        return {"largest_cosine": self.largest, "mean_squared_cosine": self.mean_square,
                "chance_mean_squared_cosine": self.chance}


def angles(a: Part, b: Part) -> tuple[Angles, Angles] | None:
    """(row spaces, column spaces); None where one is no product, or zero."""
    first, second = a.factors(), b.factors()
    if first is None or second is None:
        return None
    one, other = bases(first), bases(second)
    if one is None or other is None:
        return None
    return between(one[1], other[1]), between(one[0], other[0])


def turned(a: Part, b: Part) -> float | None:
    """The variance of ⟨a, b⟩ if b's outputs, or its inputs, were turned at random: the larger of ‖b·aᵀ‖²/m and ‖bᵀ·a‖²/n.

    For spaces in random position both are ‖a‖²‖b‖²/(m·n). Two LoRAs of one seed start from the same A and read the same
    inputs, which makes chance cosines as large as those of r inputs, not n. None where one is no product.
    """
    first, second = a.factors(), b.factors()
    if first is None or second is None:
        return None
    (left, right), (tall, wide) = first, second
    inputs, outputs = wide @ right.T, tall.T @ left
    reads = ((tall.T @ tall) @ inputs @ (left.T @ left) * inputs).sum() / len(left)
    writes = ((wide @ wide.T) @ outputs @ (right @ right.T) * outputs).sum() / right.shape[1]
    return float(max(reads, writes)) * (a.scale * b.scale) ** 2


def products(a: Part, b: Part) -> tuple[float, float, float]:
    """(⟨a, b⟩, ‖a‖², ‖b‖²) from r x r Gram matrices: ⟨B·A, D·C⟩ = Σ (BᵀD) ⊙ (A·Cᵀ). UsageError where one is no product."""
    first, second = a.factors(), b.factors()
    if first is None or second is None:
        raise UsageError(f"{a.name} has no factors", hint="leave out --fast")

    def inner(one: Pair, other: Pair) -> float:
        return float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())

    return a.scale * b.scale * inner(first, second), a.scale**2 * inner(first, first), b.scale**2 * inner(second, second)


def bases(pair: Pair) -> Pair | None:
    """Left and right singular vectors of a product, [m, k] and [n, k]; None where it is zero."""
    (tall, upper), (wide, lower) = torch.linalg.qr(pair[0]), torch.linalg.qr(pair[1].T)
    u, values, vt = torch.linalg.svd(upper @ lower.T)
    count = int((values > _NEGLIGIBLE * values[0]).sum()) if len(values) and values[0] > 0 else 0
    return (tall @ u[:, :count], wide @ vt[:count].T) if count else None


def between(one: torch.Tensor, other: torch.Tensor) -> Angles:
    cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1)
    return Angles(float(cosines[0]), float(cosines.square().mean()), min(1.0, max(one.shape[1], other.shape[1]) / len(one)))
