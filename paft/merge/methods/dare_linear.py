"""DARE linear: drop at random, rescale, weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from paft.delta import Tiled
from paft.merge.drop import drop
from paft.merge.ops import PerAdapter, Plan, WeightedSum, densities, divisor, find_dialect


def dare_linear(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    dialect: str = "mergekit",
    seed: int = 0,
) -> Plan:
    """Drop entries at random, restore the size, then add.

        m_i ~ Bernoulli(density),   x_i = c_i · m_i ⊙ δ_i
        D = λ · Σ_i w_i x_i   (/ Σ_i w_i with ``normalize``)

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``density`` in (0, 1]: the share of entries
    kept (the paper's 1 - p), one number or one for each adapter, 1 = all; λ: ``lambda``. ``rescale`` sets c_i, else
    c_i = 1:

        mergekit     c_i = ‖δ_i‖₁ / ‖m_i ⊙ δ_i‖₁        per tensor
        paper, peft  c_i = 1 / density

    The mask comes from a counter-based generator keyed by (seed, adapter's content hash, tensor name, entry), so it
    is the same for any tile size, thread count, shard layout and order of adapters; mergekit and PEFT draw from the
    global generator. PEFT drops entries of A and B; this drops entries of ΔW. Raises UsageError for a density outside
    (0, 1].

    Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099), eq. 3.
    """
    rules = find_dialect(dialect)
    shares = densities(density, len(deltas))
    filters = [drop(delta, share, seed, rescale, rules) for delta, share in zip(deltas, shares, strict=True)]
    scale = lambda_ / divisor(weights, normalize)
    return Plan(filters, WeightedSum(tuple(scale * weight for weight in weights)))
