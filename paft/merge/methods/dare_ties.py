"""DARE TIES: drop at random, rescale, elect sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from paft.delta import Tiled
from paft.merge.consensus import Consensus, consensus
from paft.merge.drop import drop
from paft.merge.ops import PerAdapter, Plan, densities, find_dialect


def dare_ties(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    normalize: bool | None = None,
    rescale: bool = True,
    lambda_: float = 1.0,
    dialect: str = "mergekit",
    seed: int = 0,
) -> Plan:
    """Drop entries at random, restore the size, then vote as TIES.

        m_i ~ Bernoulli(density),   x_i = c_i · m_i ⊙ δ_i
        s = sign(Σ_i v_i),   agree_i = [sign(v_i) = s]
        D = λ · Σ_i w_i x_i agree_i / n

    Symbols and masks as in ``dare_linear``; the vote as in ``ties``. The dialect sets c_i (with ``rescale``), v_i,
    and whether n averages or is 1 when ``normalize`` is left at null:

        mergekit  c_i = ‖δ_i‖₁ / ‖m_i ⊙ δ_i‖₁  v_i = w_i x_i  n = 1
        peft      c_i = 1 / density            v_i = x_i      n = Σ agree_i
        paper     c_i = 1 / density            v_i = x_i      n = Σ agree_i

    With ``normalize`` mergekit's n is Σ w_i agree_i. 0 elects the tensor's majority sign by paper, else +. Raises
    UsageError for a density outside (0, 1], and for a negative weight with ``normalize`` in the mergekit dialect.

    Source: Yu et al. (arXiv 2311.03099), eq. 3, with Yadav et al. (arXiv 2306.01708), Algorithm 1, after it.
    """
    rules = find_dialect(dialect)
    shares = densities(density, len(deltas))
    filters = [drop(delta, share, seed, rescale, rules) for delta, share in zip(deltas, shares, strict=True)]
    mean = rules.mean if normalize is None else normalize
    return consensus(deltas, filters, Consensus(weights, rules, mean, lambda_))
