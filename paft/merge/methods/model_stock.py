"""Model Stock: the mean, shortened by how much the deltas disagree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, combine_linearly, keep, no_weights, row_sums, weighted_sum
from paft.merge.sphere import directions


def model_stock(deltas: Sequence[Tiled], weights: Sequence[float], *, filter_wise: bool = False) -> Plan:
    """The mean, shortened by how much the deltas disagree.

        c = mean_{i<j} ⟨δ_i, δ_j⟩ / (‖δ_i‖ ‖δ_j‖),   t = N c / (1 + (N - 1) c)
        D = t/N · Σ_i δ_i

    δ_i: ΔW of adapter i [rows, columns], N ≥ 2 of them, without weights. t is 1 where all agree and 0 where they are
    at right angles, as LoRAs of different tasks nearly are: made for many trainings of one task. Deltas at obtuse
    angles give a negative t, as the formula and mergekit do; where the divisor vanishes (below 1e-6), t = 0.
    ``filter_wise``: c and t for each row apart. Else the result is linear in the deltas, so it is exactly a LoRA of
    rank Σr.

    Equals mergekit's, but for small deltas: mergekit divides by at least 1e-6, which takes cos θ of deltas with norms
    below 1e-3 for smaller than it is. A delta of zero has cos θ = 0 with any other. PEFT has none. Raises UsageError
    for fewer than two adapters, and for weights.

    Source: Jang et al., Model Stock (arXiv 2403.19522).
    """
    count = len(deltas)
    if count < 2:
        raise UsageError("model_stock compares adapters: it needs at least two", hint="use task_arithmetic for one")
    no_weights("model_stock", weights)
    pairs = list(itertools.combinations(range(count), 2))
    if not filter_wise:
        cosines = directions(deltas)[1]
        cosine = torch.tensor(math.fsum(cosines[i][j] for i, j in pairs) / len(pairs), dtype=torch.float64)
        return combine_linearly([float(_ratio(cosine, count)) / count] * count)

    def combine(parts: list[torch.Tensor], start: int) -> torch.Tensor:
        wide = [part.double() for part in parts]
        norms = [row_sums(part.square()).sqrt() for part in wide]
        cosine = torch.zeros_like(norms[0])
        for i, j in pairs:
            size = norms[i] * norms[j]
            inner = row_sums(wide[i] * wide[j])
            cosine += torch.where(size > 0, inner / torch.where(size > 0, size, 1), 0).clamp(-1, 1)
        share = _ratio(cosine / len(pairs), count) / count
        return weighted_sum(parts, [1.0] * count) * share.to(parts[0].dtype)[:, None]

    return Plan([keep] * count, combine)


def _ratio(cosine: torch.Tensor, count: int) -> torch.Tensor:
    """t, and 0 where it has no finite value."""
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < 1e-6
    return torch.where(singular, 0, count * cosine / torch.where(singular, 1, divisor))
