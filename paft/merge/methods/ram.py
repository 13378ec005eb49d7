"""RAM: add what one adapter alone changes, average what several change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, no_weights
from paft.merge.trim import Trim


def ram(deltas: Sequence[Tiled], weights: Sequence[float], *, epsilon: float = 1e-5) -> Plan:
    """Add what one adapter alone changes, average what several do.

        m_i = [|δ_i| > epsilon],   D = Σ_i m_i δ_i / max(1, Σ_i m_i)

    δ_i: ΔW of adapter i [rows, columns], without weights. Entries up to ``epsilon`` count as unchanged and are
    dropped. Made for the sparse deltas of reinforcement learning and preference training; a dense adapter shares
    nearly every entry, which makes this a mean. epsilon is absolute: see `paft sparsity-report` for the scale of
    yours. Equals mergekit's; PEFT has none. Raises UsageError for weights, and for a negative epsilon.

    Source: Reinforced Agent Merging (arXiv 2601.13572).
    """
    no_weights("ram", weights)
    if not epsilon >= 0:
        raise UsageError(f"epsilon of ram must not be negative, not {epsilon}", hint="0 keeps every entry")

    def combine(parts: list[torch.Tensor], start: int) -> torch.Tensor:
        out = torch.zeros_like(parts[0])
        for part in parts:
            out += part
        return out / changes(parts).clamp(min=1).to(out.dtype)

    return Plan([Trim(epsilon, -1)] * len(deltas), combine)


def changes(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """How many adapters change each entry."""
    count = torch.zeros(parts[0].shape, dtype=torch.int64)
    for part in parts:
        count += part != 0
    return count
