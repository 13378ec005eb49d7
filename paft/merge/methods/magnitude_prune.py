"""Magnitude pruning: trim, then the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paft.delta import Tiled
from paft.merge.ops import DIALECTS, Filter, PerAdapter, Plan, WeightedSum
from paft.merge.trim import trimmed


def magnitude_prune(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    lambda_: float = 1.0,
    scope: Literal["tensor", "global"] = "tensor",
    trims: Sequence[Filter] | None = None,
) -> Plan:
    """Trim each delta to its largest entries, then add them.

        D = λ · Σ_i w_i · top_density(|δ_i|)

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``density`` in (0, 1]: the share of entries
    kept, ``max(1, int(density·numel))`` of them, one number or one for each adapter, 1 = all; λ: ``lambda``. Equal
    magnitudes are kept in index order. ``scope``: the share is per tensor, or over all tensors of an adapter
    (``global``). The control that tells trimming from voting. Raises UsageError for a density outside (0, 1].

    Source: PEFT's ``magnitude_prune``, but on the true ΔW instead of on A and B. mergekit has no such method.
    """
    filters = trimmed(deltas, density, DIALECTS["peft"], trims=trims)
    return Plan(filters, WeightedSum(tuple(lambda_ * weight for weight in weights)))
