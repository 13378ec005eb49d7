"""Model breadcrumbs: drop the outliers and the small entries, then the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paft.delta import Tiled
from paft.merge.ops import DIALECTS, Filter, PerAdapter, Plan, WeightedSum, divisor
from paft.merge.trim import trimmed


def breadcrumbs(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    gamma: PerAdapter = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    scope: Literal["tensor", "global"] = "tensor",
    trims: Sequence[Filter] | None = None,
) -> Plan:
    """Drop the outliers and the small entries, add what is left.

        x_i = top_(gamma+density)(|δ_i|) without top_gamma(|δ_i|)
        D = λ · Σ_i w_i x_i   (/ Σ_i w_i with ``normalize``)

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``density`` in (0, 1]: the share of entries
    kept, max(1, int(density·numel)) of them; ``gamma`` in [0, 1): the share dropped from the top, int(gamma·numel),
    fewer where density and gamma exceed 1, and none at density 1. Both are one number or one for each adapter; λ:
    ``lambda``. ``rescale`` restores each ‖δ_i‖₁. Equal magnitudes are ranked in index order. ``scope``: the numbers
    are per tensor, as in the paper and in mergekit, or over all tensors of an adapter (``global``).

    Equals mergekit's, which may keep nothing where this keeps one entry. The paper names the two ends instead: it
    keeps what lies between two percentiles of each layer, of which gamma and 1 - gamma - density are the tails. PEFT
    has none. Raises UsageError for a density outside (0, 1] or a gamma outside [0, 1).

    Source: Davari and Belilovsky, Model Breadcrumbs (arXiv 2312.06795).
    """
    filters = trimmed(deltas, density, DIALECTS["mergekit"], gamma=gamma, rescale=rescale, trims=trims)
    scale = lambda_ / divisor(weights, normalize)
    return Plan(filters, WeightedSum(tuple(scale * weight for weight in weights)))
