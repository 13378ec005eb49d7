"""DELLA linear: drop small entries more often, rescale, weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from paft.delta import Tiled
from paft.merge.drop import ranked_drop
from paft.merge.ops import Dialect, Filter, PerAdapter, Plan, WeightedSum, densities, divisor, find_dialect, numbers


def della_linear(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    epsilon: PerAdapter = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    dialect: str = "mergekit",
    seed: int = 0,
) -> Plan:
    """Drop at random, small entries first, then add.

        p_i = density - ε + 2ε·(rank of |δ_i| in its row - 1) / (columns - 1)
        m_i ~ Bernoulli(p_i),   x_i = c_i · m_i ⊙ δ_i
        D = λ · Σ_i w_i x_i   (/ Σ_i w_i with ``normalize``)

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``density`` in (0, 1]: the mean share of
    entries kept, 1 = all; ε: ``epsilon``, half the range of p within a row, whose smallest entry has rank 1; both one
    number or one for each adapter; λ: ``lambda``. ``rescale`` sets c_i, else c_i = 1:

        mergekit     c_i = ‖δ_i‖₁ / ‖m_i ⊙ δ_i‖₁   per tensor
        paper, peft  c_i = 1 / p_i                 per entry: its mean is δ_i

    A vector is one row; in a row of one entry p = density, where mergekit divides 0 by 0. Equal magnitudes rank in
    index order. Masks are counter-based as in ``dare_linear``: the same for any tiles, threads, shards and order of
    adapters. PEFT has no DELLA. Raises UsageError for a density outside (0, 1], and for density ± epsilon outside
    (0, 1) unless density is 1.

    Source: Deep et al., DELLA-Merging (arXiv 2406.11617), MagPrune.
    """
    rules = find_dialect(dialect)
    scale = lambda_ / divisor(weights, normalize)
    kept = filters(deltas, density, epsilon, seed, rescale, rules)
    return Plan(kept, WeightedSum(tuple(scale * weight for weight in weights)))


def filters(
    deltas: Sequence[Tiled], density: PerAdapter, epsilon: PerAdapter, seed: int, rescale: bool, rules: Dialect
) -> list[Filter]:
    """MagPrune: one filter per delta."""
    shares, halves = densities(density, len(deltas)), numbers("epsilon", epsilon, len(deltas))
    return [ranked_drop(d, share, half, seed, rescale, rules) for d, share, half in zip(deltas, shares, halves, strict=True)]
