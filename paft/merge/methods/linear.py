"""Linear: the weighted mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, combine_linearly


def linear(deltas: Sequence[Tiled], weights: Sequence[float], *, normalize: bool = True) -> Plan:
    """The weighted mean, that of the models too ("model soup").

        D = Σ_i w_i δ_i / Σ_i w_i

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default. ``normalize=false`` leaves the division out.
    The result is linear in the deltas, so it is exactly a LoRA of rank Σr. Raises UsageError when the weights sum to
    zero.

    Source: Wortsman et al., Model soups (arXiv 2203.05482). Equals mergekit's ``linear`` over the folded models.
    PEFT's ``linear`` averages A and B separately, which adds cross terms √(w₁w₂)(B₁A₂ + B₂A₁); this does not.
    """
    total = math.fsum(weights) if normalize else 1.0
    if abs(total) < 1e-8:
        raise UsageError("the weights of linear sum to zero", hint="set normalize=false, or use task_arithmetic")
    return combine_linearly([weight / total for weight in weights])
