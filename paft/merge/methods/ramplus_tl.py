"""RAM+: RAM, where an adapter that shares much is made stronger on what it alone changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.methods.ram import changes
from paft.merge.ops import Plan, no_weights, totals
from paft.merge.trim import Trim


def ramplus_tl(
    deltas: Sequence[Tiled], weights: Sequence[float], *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> Plan:
    """RAM, with what an adapter alone changes made stronger.

        m_i = [|δ_i| > epsilon],   n = Σ_i m_i
        ρ_i = Σ m_i [n > 1] / Σ m_i [n = 1]   (sums over the tensor)
        D = Σ_i m_i δ_i · (1 + r·min(ρ_i, alpha) where n = 1, 1/n where n > 1)

    δ_i: ΔW of adapter i [rows, columns], without weights. ρ_i says how much of what an adapter changes is shared, and
    so halved or worse; its own entries make up for it, tensor by tensor ("tl"). An adapter that shares everything has
    no entry of its own to strengthen. Equals mergekit's; PEFT has none. Raises UsageError for weights, and for a
    negative ``r``, ``alpha`` or ``epsilon``.

    Source: Reinforced Agent Merging (arXiv 2601.13572).
    """
    no_weights("ramplus_tl", weights)
    if not (r >= 0 and alpha >= 0 and epsilon >= 0):
        raise UsageError(f"ramplus_tl takes no negative r, alpha or epsilon ({r}, {alpha}, {epsilon})")
    changed = Trim(epsilon, -1)

    def shared_and_own(tiles: list[torch.Tensor], start: int) -> list[torch.Tensor]:
        parts = [changed(tile, start) for tile in tiles]
        count = changes(parts)
        return [(part != 0) & (count > 1) for part in parts] + [(part != 0) & (count == 1) for part in parts]

    sums = totals(deltas, shared_and_own)
    overlap = [shared / own if own else 0.0 for shared, own in zip(sums[: len(deltas)], sums[len(deltas) :], strict=True)]
    strength = [1 + r * min(each, alpha) for each in overlap]

    def combine(parts: list[torch.Tensor], start: int) -> torch.Tensor:
        count = changes(parts)
        shared = 1 / count.clamp(min=1).to(parts[0].dtype)
        out = torch.zeros_like(parts[0])
        for part, each in zip(parts, strength, strict=True):
            out += part * torch.where(count > 1, shared, each)
        return out

    return Plan([changed] * len(deltas), combine)
