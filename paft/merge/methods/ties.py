"""TIES: trim, elect sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from paft.delta import Tiled
from paft.merge.consensus import Consensus, consensus
from paft.merge.ops import Filter, PerAdapter, Plan, find_dialect
from paft.merge.trim import trimmed


def ties(
    deltas: Sequence[Tiled],
    weights: Sequence[float],
    *,
    density: PerAdapter = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    scope: Literal["tensor", "global"] | None = None,
    dialect: str = "mergekit",
    trims: Sequence[Filter] | None = None,
) -> Plan:
    """Trim to the largest, elect signs, average what agrees.

        x_i = top_density(|δ_i|),   s = sign(Σ_i v_i),   agree_i = [sign(v_i) = s]
        D = λ · Σ_i w_i x_i agree_i / n

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; ``density`` in (0, 1]: the share of entries
    kept, one number or one for each adapter, 1 = all; λ: ``lambda``. ``rescale`` restores each ‖δ_i‖₁ after trimming.
    Equal magnitudes are kept in index order. n is 1 without ``normalize``, and where nobody agrees. The dialect sets
    the rest, ``scope`` too where it is null (``global``: one threshold over all tensors of an adapter, in two passes):

        mergekit  v_i = w_i x_i   n = Σ w_i agree_i   0 elects +       tensor
        peft      v_i = x_i       n = Σ agree_i       0 elects +       tensor
        paper     v_i = x_i       n = Σ agree_i       0: the majority  global

    max(1, int(density·numel)) entries are kept; by paper one more, and all that equal the last. The majority sign is
    per tensor; the paper's own code takes it over the model, which only exact opposites can tell. PEFT's ``ties``
    works on A and B separately, which is another quantity: the ``peft`` dialect is its formula on the true ΔW
    (``ties_svd`` before truncation). With equal weights mergekit and peft agree. Raises UsageError for a density
    outside (0, 1], and for a negative weight with ``normalize`` in the mergekit dialect, where mergekit silently
    cancels the sign.

    Source: Yadav et al., TIES-Merging (arXiv 2306.01708), Algorithm 1.
    """
    rules = find_dialect(dialect)
    filters = trimmed(deltas, density, rules, rescale=rescale, trims=trims)
    return consensus(deltas, filters, Consensus(weights, rules, normalize, lambda_))
