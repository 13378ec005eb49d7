"""Multi-SLERP: the mean direction of any number of deltas, at their mean length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paft.delta import Tiled
from paft.errors import MismatchError
from paft.merge.ops import Plan, combine_linearly
from paft.merge.sphere import directions, shares


def multislerp(
    deltas: Sequence[Tiled], weights: Sequence[float], *, normalize_weights: bool = True, eps: float = 1e-8
) -> Plan:
    """The mean direction of the deltas, at their mean length.

        u_i = δ_i / ‖δ_i‖,   m = Σ_i w_i u_i,   D = (Σ_i w_i ‖δ_i‖) · m / ‖m‖

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default, divided by Σ w unless ``normalize_weights``
    is false. mergekit projects the u_i onto the plane that touches the sphere at m / ‖m‖ and maps their weighted sum
    back; that sum is Σ w_i u_i - ⟨m, m⟩ m / ‖m‖² = 0 for any input, so only the formula above is left. ``karcher``
    does the mean that this approximates. Unlike mergekit, ‖δ_i‖ is not raised by ``eps``, so small deltas lose
    nothing. Where ‖m‖ < ``eps`` two deltas are added, w₁ δ₁ + w₂ δ₂, as in mergekit.

    The result is linear in the deltas, so it is exactly a LoRA of rank Σr; all comes from their inner products. Raises
    UsageError for weights that sum to zero, MismatchError where more than two directions cancel.

    Source: Goddard, Multi-SLERP (goddard.blog), and mergekit's ``multislerp`` with a base.
    """
    weights = shares("multislerp", weights, negative=True) if normalize_weights else list(weights)
    norms, cosines = directions(deltas)
    used = [place for place, norm in enumerate(norms) if norm and weights[place]]
    square = math.fsum(weights[i] * weights[j] * cosines[i][j] for i in used for j in used)
    # Inner products in float64 cannot tell a mean that is shorter than 1e-7 of its parts from zero.
    if not used or square < max(eps**2, 1e-14 * math.fsum(weights[i] ** 2 for i in used)):
        if len(used) > 2:
            name = deltas[0].key.rpartition("\0")[2]
            raise MismatchError(f"multislerp: the directions of the deltas of {name} cancel", hint="use other weights")
        return combine_linearly(weights)
    length = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / math.sqrt(square)
    return combine_linearly([length * weight / norm if norm else 0.0 for weight, norm in zip(weights, norms, strict=True)])
