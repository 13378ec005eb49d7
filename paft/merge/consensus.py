"""TIES's second half, shared by every method with a vote: elect one sign per entry, merge the parts that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Dialect, Filter, Plan, total, weighted_sum


@dataclass(frozen=True)
class Consensus:
    """TIES's second half: elect a sign for each entry, then merge the parts that agree with it.

        s = sign(Σ v_i),  agree_i = [sign(v_i) = s],   D = λ·Σ w_i x_i·agree_i / divisor

    Weighted (mergekit): v_i = w_i x_i and the divisor is Σ w_i·agree_i; else v_i = x_i and it counts the parts that
    agree. A divisor of zero is 1, and without ``normalize`` it is always 1. ``positive`` says which sign a vote of
    exactly zero elects.
    """

    weights: Sequence[float]
    dialect: Dialect
    normalize: bool
    scale: float
    positive: bool = True

    def votes(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if not self.dialect.weighted:
            return list(parts)
        return [part * weight for part, weight in zip(parts, self.weights, strict=True)]

    def __call__(self, parts: list[torch.Tensor], start: int) -> torch.Tensor:
        votes = self.votes(parts)
        elected = weighted_sum(votes, [1.0] * len(votes))
        up = elected >= 0 if self.positive else elected > 0
        out, share = torch.zeros_like(elected), torch.zeros_like(elected)
        for part, vote, weight in zip(parts, votes, self.weights, strict=True):
            agree = ((vote > 0) == up) & (vote != 0)
            out += (vote if self.dialect.weighted else part * weight) * agree
            share += agree.to(share.dtype) * (weight if self.dialect.weighted else 1.0)
        if self.normalize:
            out /= share + (share == 0)
        return out if self.scale == 1 else out * self.scale


def consensus(deltas: Sequence[Tiled], filters: Sequence[Filter], rule: Consensus) -> Plan:
    """A plan that filters, votes and merges; a further pass finds the majority sign where the dialect asks for one."""
    if rule.dialect.weighted and rule.normalize and min(rule.weights) < 0:
        raise UsageError(
            "a negative weight with normalize=true loses its sign (it cancels in the weighted mean)",
            hint="set normalize=false, or use task_arithmetic",
        )
    if rule.dialect.majority:

        def elected(tile: torch.Tensor, start: int) -> torch.Tensor:
            others = [delta.tile(start, start + len(tile)) for delta in deltas[1:]]
            parts = [f(each, start) for f, each in zip(filters, [tile, *others], strict=True)]
            return weighted_sum(rule.votes(parts), [1.0] * len(parts)).sign()

        rule = replace(rule, positive=total(deltas[0], elected) > 0)
    return Plan(filters, rule)
