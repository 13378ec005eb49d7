"""DELLA: drop small entries more often, rescale, elect sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from paft.delta import Tiled
from paft.merge.consensus import Consensus, consensus
from paft.merge.methods.della_linear import filters
from paft.merge.ops import PerAdapter, Plan, find_dialect


def della(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    epsilon: PerAdapter = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    dialect: str = "mergekit",
    seed: int = 0,
) -> Plan:
    """Drop at random, small entries first, then vote and average.

        p_i = density - ε + 2ε·(rank of |δ_i| in its row - 1) / (columns - 1)
        m_i ~ Bernoulli(p_i),   x_i = c_i · m_i ⊙ δ_i
        s = sign(Σ_i v_i),   agree_i = [sign(v_i) = s]
        D = λ · Σ_i w_i x_i agree_i / n

    Symbols, masks and c_i as in ``della_linear``; the vote as in ``ties``:

        mergekit  c_i = ‖δ_i‖₁ / ‖m_i ⊙ δ_i‖₁  v_i = w_i x_i  n = Σ w_i agree_i
        peft      c_i = 1 / p_i                v_i = x_i      n = Σ agree_i
        paper     c_i = 1 / p_i                v_i = x_i      n = Σ agree_i

    n is 1 without ``normalize``; 0 elects the tensor's majority sign by paper, else +. PEFT has no DELLA: its dialect
    is its vote. Raises UsageError for a density outside (0, 1], for density ± epsilon outside (0, 1), and for a
    negative weight with ``normalize`` in the mergekit dialect.

    Source: Deep et al., DELLA-Merging (arXiv 2406.11617).
    """
    rules = find_dialect(dialect)
    kept = filters(deltas, density, epsilon, seed, rescale, rules)
    return consensus(deltas, kept, Consensus(weights, rules, normalize, lambda_))
