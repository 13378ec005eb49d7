"""Task arithmetic: the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from paft.delta import Tiled
from paft.merge.ops import Plan, combine_linearly, divisor


def task_arithmetic(deltas: Sequence[Tiled], weights: Sequence[float], *, normalize: bool = False, lambda_: float = 1.0) -> Plan:
    """The weighted sum: every delta is added in full.

        D = λ · Σ_i w_i δ_i        (divided by Σ_i w_i with ``normalize``)

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default; λ: ``lambda``, the strength of the whole.
    Weights may be negative (forgetting). The result is linear in the deltas, so it is exactly a LoRA of rank Σr.

    Source: Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089), eq. 1. Equals mergekit's
    ``task_arithmetic`` and PEFT's ``cat``; PEFT's ``linear`` adds cross terms.
    """
    share = divisor(weights, normalize)
    return combine_linearly([lambda_ * weight / share for weight in weights])
