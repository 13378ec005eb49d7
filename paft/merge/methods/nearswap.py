"""NearSwap: every entry moves towards the adapter, by t at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import PerAdapter, Plan, WeightedSum, numbers


@dataclass(frozen=True)
class Clip:
    """Entries cut to [-t, t]."""

    t: float

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        return tile.clamp(-self.t, self.t)


def nearswap(deltas: Sequence[Tiled], weights: Sequence[float], *, t: PerAdapter | None = None) -> Plan:
    """Add the deltas with every entry clipped to [-t, t].

        D = Σ_i w_i · max(-t, min(t, δ_i))

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``t`` > 0, one number or one for each adapter,
    without a default: near the rms of the delta (`paft sparsity-report` prints it) it tames outliers alone. mergekit
    writes it as W + min(1, t / |δ|) δ with one model beside the base, and takes |δ| for at least 1e-6, so that
    smaller entries shrink when t is smaller too; here any number of adapters may be added, and nothing shrinks. PEFT
    has none. Raises UsageError without t, or unless it is positive.

    Source: alchemonaut's QuartetAnemoi-70B (Hugging Face), and mergekit's ``nearswap``.
    """
    if t is None:
        raise UsageError("nearswap needs t, the largest change of an entry", hint="for example -p t=1e-3")
    bounds = numbers("t", t, len(deltas))
    if not min(bounds) > 0:
        raise UsageError(f"t of nearswap must be positive, not {min(bounds)}")
    return Plan([Clip(bound) for bound in bounds], WeightedSum(tuple(weights)))
