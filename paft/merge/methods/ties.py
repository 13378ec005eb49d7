"""TIES: trim, elect sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from paft.delta import Tiled
from paft.merge.consensus import Consensus, consensus
from paft.merge.ops import PerAdapter, Plan, densities, find_dialect
from paft.merge.trim import trim


def ties(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    dialect: str = "mergekit",
) -> Plan:
    """Trim each delta to its largest entries, elect a sign for each entry, average the deltas that agree with it.

        x_i = top_density(|δ_i|),   s = sign(Σ_i v_i),   agree_i = [sign(v_i) = s]
        D = λ · Σ_i w_i x_i agree_i / n

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``density`` in (0, 1]: the share of entries
    kept, one number or one for each adapter, 1 = all; λ: ``lambda``. Equal magnitudes are kept in index order. n is 1
    without ``normalize``, and where nobody agrees. The dialect sets the rest:

        mergekit  v_i = w_i x_i   n = Σ w_i agree_i   0 elects +         keeps max(1, int(density·numel))
        peft      v_i = x_i       n = Σ agree_i       0 elects +         keeps max(1, int(density·numel))
        paper     v_i = x_i       n = Σ agree_i       0: the majority    keeps int(density·numel) + 1, and equals

    Trimming and the majority sign are per tensor in all dialects; the paper's own code takes them over the whole
    model. PEFT's ``ties`` works on A and B separately, which is another quantity: the ``peft`` dialect is its formula
    on the true ΔW (``ties_svd`` before truncation). With equal weights mergekit and peft agree. Raises UsageError for
    a density outside (0, 1], and for a negative weight with ``normalize`` in the mergekit dialect, where mergekit
    silently cancels the sign.

    Source: Yadav et al., TIES-Merging (arXiv 2306.01708), Algorithm 1.
    """
    rules = find_dialect(dialect)
    filters = [trim(d, share, rules) for d, share in zip(deltas, densities(density, len(deltas)), strict=True)]
    return consensus(deltas, filters, Consensus(weights, rules, normalize, lambda_))
