"""SLERP: between two deltas along the arc instead of the chord."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, combine_linearly, dot, keep, weighted_sum


def slerp(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    t: float | None = None,
    space: Literal["delta", "weight"] = "delta",
    base: Tiled | None = None,
) -> Plan:
    """Go from the first delta to the second along the arc between them, tensor by tensor. Exactly two adapters.

        D = [sin((1-t)θ) δ₁ + sin(tθ) δ₂] / sin θ,   cos θ = ⟨δ₁, δ₂⟩ / (‖δ₁‖ ‖δ₂‖)

    δ_i: ΔW of adapter i [rows, columns]; ``t`` in [0, 1]: 0 gives the first, 1 the second; left at null it is w₂ /
    (w₁ + w₂), so 0.5 by default. Parallel deltas (1 - cos²θ ≤ 1e-16) and a delta of zero are interpolated linearly.
    In delta space the result is linear in the deltas, so it is exactly a LoRA of rank Σr.

    ``space: weight`` interpolates W + δ₁ and W + δ₂ instead, linearly where |cos θ| > 0.9995: mergekit's ``slerp``.
    For adapters it nearly always is, so it gives what ``linear`` gives. Delta space is mergekit's ``nuslerp`` with a
    base. PEFT has no SLERP. Raises UsageError for another number of adapters, t outside [0, 1], weights that sum to
    zero, or both t and weights.

    Source: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985).
    """
    if len(deltas) != 2:
        raise UsageError(f"slerp goes between two adapters, not {len(deltas)}", hint="use linear or ties for any number")
    t = _share(t, weights)
    if space == "delta":
        return combine_linearly(list(_arc(t, *_products(deltas[0], deltas[1]), flat=_PARALLEL, origin_is_flat=True)))
    if base is None:
        raise UsageError("slerp in weight space needs the base's tensors", hint="use space: delta")
    first, second = (_Shifted(base, delta) for delta in deltas)
    a, b = _arc(t, *_products(first, second), flat=0.9995, origin_is_flat=False)

    def combine(parts: list[torch.Tensor], start: int) -> torch.Tensor:
        weight = base.tile(start, start + len(parts[0]))
        return weighted_sum([*parts, weight], [a, b, a + b - 1])

    return Plan([keep, keep], combine)


_PARALLEL = math.sqrt(1 - 1e-16)


def _share(t: float | None, weights: Sequence[float]) -> float:
    if t is None:
        if abs(math.fsum(weights)) < 1e-8:
            raise UsageError("the weights of slerp sum to zero", hint="give t instead")
        t = weights[1] / math.fsum(weights)
    elif list(weights) != [1.0, 1.0]:
        raise UsageError("slerp takes t or weights, not both", hint="t is the second weight's share")
    if not 0 <= t <= 1:
        raise UsageError(f"t of slerp must be in [0, 1], not {t}")
    return t


def _products(first: Tiled, second: Tiled) -> tuple[float, float, float]:
    return dot(first, second), dot(first, first), dot(second, second)


def _arc(t: float, inner: float, first: float, second: float, *, flat: float, origin_is_flat: bool) -> tuple[float, float]:
    """The coefficients of both ends, from ⟨x, y⟩, ⟨x, x⟩ and ⟨y, y⟩; linear where |cos θ| reaches ``flat``."""
    size = math.sqrt(first * second)
    cosine = max(-1.0, min(1.0, inner / size)) if size else 0.0
    if abs(cosine) > flat or (origin_is_flat and not size) or t in (0, 1):
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@dataclass(frozen=True)
class _Shifted:
    """``W + δ`` as tiles."""

    base: Tiled
    delta: Tiled

    @property
    def rows(self) -> int:
        return self.delta.rows

    @property
    def columns(self) -> int:
        return self.delta.columns

    @property
    def step(self) -> int:
        return self.delta.step

    @property
    def key(self) -> str:
        return self.delta.key

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return self.base.tile(start, stop) + self.delta.tile(start, stop)
