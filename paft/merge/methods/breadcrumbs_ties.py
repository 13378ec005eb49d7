"""Breadcrumbs TIES: drop the outliers and the small entries, elect sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paft.delta import Tiled
from paft.merge.consensus import Consensus, consensus
from paft.merge.ops import DIALECTS, Filter, PerAdapter, Plan
from paft.merge.trim import trimmed


def breadcrumbs_ties(
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
    """Drop outliers and small entries, then vote as TIES.

        x_i = top_(gamma+density)(|δ_i|) without top_gamma(|δ_i|)
        s = sign(Σ_i w_i x_i),   agree_i = [sign(w_i x_i) = s]
        D = λ · Σ_i w_i x_i agree_i   (/ Σ_i w_i agree_i with ``normalize``)

    Symbols and parameters as in ``breadcrumbs``; the vote is that of ``ties`` in the mergekit dialect, 0 elects +.
    Equals mergekit's, its only source. PEFT has none. Raises UsageError for a density outside (0, 1], a gamma outside
    [0, 1), and for a negative weight with ``normalize``.

    Source: mergekit's ``breadcrumbs_ties``: Davari and Belilovsky (arXiv 2312.06795), then Yadav et al. (arXiv
    2306.01708).
    """
    rules = DIALECTS["mergekit"]
    filters = trimmed(deltas, density, rules, gamma=gamma, rescale=rescale, trims=trims)
    return consensus(deltas, filters, Consensus(weights, rules, normalize, lambda_))
