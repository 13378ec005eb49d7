"""Magnitude pruning: trim, then the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from paft.delta import Tiled
from paft.merge.ops import DIALECTS, PerAdapter, Plan, WeightedSum, densities
from paft.merge.trim import trim


def magnitude_prune(
    deltas: Sequence[Tiled], weights: Sequence[float], *, density: PerAdapter = 1.0, lambda_: float = 1.0
) -> Plan:
    """Trim each delta to its largest entries, then add them: the control that tells trimming from voting.

        D = λ · Σ_i w_i · top_density(|δ_i|)

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``density`` in (0, 1]: the share of entries
    kept per tensor, ``max(1, int(density·numel))`` of them, one number or one for each adapter, 1 = all; λ:
    ``lambda``. Equal magnitudes are kept in index order. Raises UsageError for a density outside (0, 1].

    Source: PEFT's ``magnitude_prune``, but on the true ΔW instead of on A and B. mergekit has no such method.
    """
    shares = densities(density, len(deltas))
    filters = [trim(delta, share, DIALECTS["peft"]) for delta, share in zip(deltas, shares, strict=True)]
    return Plan(filters, WeightedSum(tuple(lambda_ * weight for weight in weights)))
