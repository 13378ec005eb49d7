"""Deltas as directions: arcs between them from inner products alone, so that LoRAs need no dense pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import gram

# Vectors are as good as parallel where 1 - cos²θ <= 1e-12. mergekit has 1e-16, which is within the rounding of cos θ:
# opposite vectors then get coefficients of 1e7.
PARALLEL = math.sqrt(1 - 1e-12)


def directions(deltas: Sequence[Tiled]) -> tuple[list[float], list[list[float]]]:
    """The norms of the deltas and their cosines, ``C[i][j] = ⟨δ_i, δ_j⟩ / (‖δ_i‖ ‖δ_j‖)``; 0 beside a delta of zero."""
    products = gram(deltas)
    norms = [math.sqrt(max(0.0, products[i][i])) for i in range(len(deltas))]
    cosines = [[0.0] * len(deltas) for _ in deltas]
    for i, left in enumerate(norms):
        for j, right in enumerate(norms):
            if left and right:
                cosines[i][j] = 1.0 if i == j else max(-1.0, min(1.0, products[i][j] / (left * right)))
    return norms, cosines


def arc(t: float, cosine: float, *, flat: float = PARALLEL) -> tuple[float, float]:
    """The coefficients of both ends at ``t`` of the arc between them; linear where |cos θ| exceeds ``flat``."""
    if abs(cosine) > flat or t in (0, 1):
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def second_share(name: str, weights: Sequence[float]) -> float:
    """t = w₂ / (w₁ + w₂); raises UsageError for another number of adapters, a sum of zero, or t outside [0, 1]."""
    if len(weights) != 2:
        raise UsageError(f"{name} goes between two adapters, not {len(weights)}", hint="use karcher for any number")
    if abs(math.fsum(weights)) < 1e-8:
        raise UsageError(f"the weights of {name} sum to zero", hint="only their ratio matters here")
    return in_range(name, weights[1] / math.fsum(weights))


def in_range(name: str, t: float) -> float:
    """``t``, or UsageError outside [0, 1]."""
    if not 0 <= t <= 1:
        raise UsageError(f"t of {name} must be in [0, 1], not {t}")
    return t


def shares(name: str, weights: Sequence[float], *, negative: bool = False) -> list[float]:
    """Weights that sum to 1; raises UsageError for a sum of zero, and for a negative weight unless it has a meaning."""
    total = math.fsum(weights)
    if abs(total) < 1e-8:
        raise UsageError(f"the weights of {name} sum to zero", hint="only their ratio matters here")
    if min(weights) < 0 and not negative:
        raise UsageError(f"{name} takes no negative weight", hint="use task_arithmetic")
    return [weight / total for weight in weights]
