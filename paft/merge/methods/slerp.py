"""SLERP: between two deltas along the arc instead of the chord."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, combine_linearly, keep, weighted_sum
from paft.merge.sphere import arc, directions, in_range, second_share


def slerp(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    t: float | None = None,
    space: Literal["delta", "weight"] = "delta",
    base: Tiled | None = None,
) -> Plan:
    """Go from the first delta to the second along an arc.

        D = [sin((1-t)θ) δ₁ + sin(tθ) δ₂] / sin θ,   cos θ = ⟨δ₁, δ₂⟩ / (‖δ₁‖ ‖δ₂‖)

    δ_i: ΔW of adapter i [rows, columns], tensor by tensor, exactly two; ``t`` in [0, 1]: 0 gives the first, 1 the
    second; left at null it is w₂ / (w₁ + w₂), so 0.5 by default. Parallel deltas (1 - cos²θ ≤ 1e-12) and a delta of
    zero are interpolated linearly. In delta space the result is linear in the deltas, so it is exactly a LoRA of rank
    Σr, and for LoRAs cos θ comes from the factors.

    ``space: weight`` interpolates W + δ₁ and W + δ₂ instead, linearly where |cos θ| > 0.9995: mergekit's ``slerp``.
    For adapters it nearly always is, so it gives what ``linear`` gives. Delta space is mergekit's ``nuslerp`` with a
    base. PEFT has no SLERP. Raises UsageError for another number of adapters, t outside [0, 1], weights that sum to
    zero, or both t and weights.

    Source: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985).
    """
    between = second_share("slerp", weights)
    if t is not None:
        if list(weights) != [1.0, 1.0]:
            raise UsageError("slerp takes t or weights, not both", hint="t is the second weight's share")
        between = in_range("slerp", t)
    if space == "delta":
        norms, cosines = directions(deltas)
        return combine_linearly(arc(between, cosines[0][1] if all(norms) else 1.0))
    if base is None:
        raise UsageError("slerp in weight space needs the base's tensors", hint="use space: delta")
    a, b = arc(between, directions([_Shifted(base, delta) for delta in deltas])[1][0][1], flat=0.9995)

    def combine(parts: list[torch.Tensor], start: int) -> torch.Tensor:
        weight = base.tile(start, start + len(parts[0]))
        return weighted_sum([*parts, weight], [a, b, a + b - 1])

    return Plan([keep, keep], combine)


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
