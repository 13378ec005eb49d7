"""Two deltas of one tensor, entry by entry: signs, supports, and what TIES would keep of them.

For a, b (s·δ of each, float32 row tiles, as a merge reads them) and their k-th largest magnitudes t_a, t_b:

    both        entries with a ≠ 0 and b ≠ 0                   conflict    those of them with ab < 0
    kept        a ≠ 0 and |a| ≥ t_a: the top-k support
    vote        TIES's: of two kept entries in conflict the smaller loses (weights 1; equal magnitudes elect +)

Counts and energies (Σ of squares, float64) over all entries follow in `Overlap`. Equal magnitudes at the threshold are all
kept here, while a merge keeps the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from paft.delta import Tiled, spans
from paft.merge.select import FUSED_FROM, select

FIELDS = ("both", "conflicts", "dot", "energy_a", "energy_b", "both_a", "both_b", "conflict_a", "conflict_b", "kept_a", "kept_b",
          "kept_both", "kept_conflicts", "kept_energy_a", "kept_energy_b", "lost_a", "lost_b")


@dataclass(frozen=True)
class Overlap:
    """Sums over ``entries``; ``x + y`` pools two tensors.

    ``both_a`` is the energy of a where both are not 0, ``conflict_a`` that where the signs differ; ``lost_a`` is the energy
    of a's kept entries that lose the vote. ``chance`` is Σ over tensors of energy_a·energy_b/entries: the variance of
    ``dot`` if one of the two were turned at random. ``expected_both`` is what ``kept_both`` would be by chance.
    """

    entries: int
    chance: float
    both: float
    conflicts: float
    dot: float
    energy_a: float
    energy_b: float
    both_a: float
    both_b: float
    conflict_a: float
    conflict_b: float
    kept_a: float
    kept_b: float
    kept_both: float
    kept_conflicts: float
    kept_energy_a: float
    kept_energy_b: float
    lost_a: float
    lost_b: float
    expected_both: float

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(*(value + getattr(other, key) for key, value in vars(self).items()))


def overlap(a: Tiled, b: Tiled, density: float) -> Overlap:
    """One pass for each k-th largest magnitude, then one over both; k = max(1, int(density·entries)), as TIES counts."""
    entries = a.rows * a.columns
    keep = max(1, int(density * entries))
    limits = [np.float32(select(each, keep).value) for each in (a, b)]
    add: Callable[..., Any] = plain
    if entries >= FUSED_FROM:
        from paft.report.kernels import add_pair as add
    sums = np.zeros(len(FIELDS))
    for start, stop in spans(a):
        add(a.tile(start, stop).numpy(), b.tile(start, stop).numpy(), *limits, sums)
    found = dict(zip(FIELDS, sums.tolist(), strict=True))
    chance = found["energy_a"] * found["energy_b"] / entries
    return Overlap(entries, chance, **found, expected_both=found["kept_a"] * found["kept_b"] / entries)


def plain(a: np.ndarray, b: np.ndarray, limit_a: np.float32, limit_b: np.float32, sums: np.ndarray) -> None:
    """Add a tile of each to ``sums``, whose places `FIELDS` names."""
    size_a, size_b, wide_a, wide_b = np.abs(a), np.abs(b), a.astype(np.float64), b.astype(np.float64)
    square_a, square_b = wide_a**2, wide_b**2
    both = (a != 0) & (b != 0)
    conflict = both & ((a > 0) != (b > 0))
    kept_a, kept_b = (size_a >= limit_a) & (a != 0), (size_b >= limit_b) & (b != 0)
    met = kept_a & kept_b
    fight = met & conflict
    a_loses = fight & ((size_a < size_b) | ((size_a == size_b) & (a < 0)))
    sums += [
        both.sum(), conflict.sum(), (wide_a * wide_b).sum(), square_a.sum(), square_b.sum(), square_a[both].sum(),
        square_b[both].sum(), square_a[conflict].sum(), square_b[conflict].sum(), kept_a.sum(), kept_b.sum(), met.sum(),
        fight.sum(), square_a[kept_a].sum(), square_b[kept_b].sum(), square_a[a_loses].sum(), square_b[fight & ~a_loses].sum(),
    ]  # fmt: skip
