"""Two deltas of one tensor, entry by entry: signs, supports, and what TIES would keep of them.

For a, b (s·δ of each, float32 row tiles, as a merge reads them) and their k-th largest magnitudes t_a, t_b:

    both        entries with a ≠ 0 and b ≠ 0                   conflict    those of them with ab < 0
    kept        a ≠ 0 and |a| ≥ t_a: the top-k support
    vote        TIES's: of two kept entries in conflict the smaller loses (weights 1; equal magnitudes elect +)

One pass puts each entry into a class by what holds of it (the bits below) and adds up the number, a², b² and ab of every
class, in float64; all counts and energies in `Overlap` are sums over classes. Equal magnitudes at the threshold are all kept
here, while a merge keeps the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paft.delta import Tiled, fill, spans
from paft.merge.select import FUSED_FROM, select
from paft.report.histogram import Histogram
from paft.report.scan import Scan

IN_A, IN_B, KEPT_A, KEPT_B, AGAINST, A_YIELDS = 1, 2, 4, 8, 16, 32
CLASSES, LANES = 64, 4  # entries take the lanes in turn, so that two sums in a row do not wait for each other


@dataclass(frozen=True)
class Overlap:
    """Sums over ``entries``; ``x + y`` pools two tensors.

    ``both_a`` is the energy of a where both are not 0, ``conflict_a`` that where the signs differ; ``lost_a`` is the energy
    of a's kept entries that lose the vote. ``chance`` is Σ over tensors of energy_a·energy_b/entries: the variance of
    ``dot`` if one of the two were turned at random (`interference` puts that of `angles.turned` in its place).
    ``expected_both`` is what ``kept_both`` would be by chance.
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


def overlap(a: Tiled, b: Tiled, density: float) -> tuple[Overlap, tuple[Histogram, Histogram]]:
    """One pass for each k-th largest magnitude, then one over both; k = max(1, int(density·entries)), as TIES counts.

    The last one also finds where the magnitudes of each lie.
    """
    entries = a.rows * a.columns
    keep = max(1, int(density * entries))
    limits = [np.float32(select(each, keep).value) for each in (a, b)]
    add: Callable[..., Any] = plain
    if entries >= FUSED_FROM:
        from paft.report.kernels import add_pair as add
    table = np.zeros((CLASSES, LANES, 4))
    scans = Scan(a.rows, a.columns), Scan(a.rows, a.columns)
    buffers = torch.empty(2, min(a.step, a.rows), a.columns)
    for start, stop in spans(a):
        tiles = [fill(place[: stop - start], each, start, stop).numpy() for place, each in zip(buffers, (a, b), strict=True)]
        add(*tiles, *limits, table)
        for found, tile in zip(scans, tiles, strict=True):
            found.add(start, 0, tile, 1.0, 1.0)
    return _of_classes(entries, table.sum(axis=1)), (scans[0].histogram, scans[1].histogram)


def plain(a: np.ndarray, b: np.ndarray, limit_a: np.float32, limit_b: np.float32, table: np.ndarray) -> None:
    """Add a tile of each to ``table`` [classes, lanes, (1, a², b², ab)]."""
    size_a, size_b = np.abs(a), np.abs(b)
    holds = {
        IN_A: a != 0, IN_B: b != 0, KEPT_A: (size_a >= limit_a) & (a != 0), KEPT_B: (size_b >= limit_b) & (b != 0),
        AGAINST: (a != 0) & (b != 0) & ((a > 0) != (b > 0)), A_YIELDS: (size_a < size_b) | ((size_a == size_b) & (a < 0)),
    }  # fmt: skip
    place = sum(bit * held.ravel() for bit, held in holds.items())
    wide_a, wide_b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    for column, values in enumerate((None, wide_a**2, wide_b**2, wide_a * wide_b)):
        table[:, 0, column] += np.bincount(place, values, CLASSES)


def _of_classes(entries: int, table: np.ndarray) -> Overlap:
    def total(column: int, bits: int = 0, without: int = 0) -> float:
        classes = np.arange(CLASSES)
        return float(table[((classes & bits) == bits) & ((classes & without) == 0), column].sum())

    both, fight = IN_A | IN_B, KEPT_A | KEPT_B | AGAINST
    energy_a, energy_b, kept_a, kept_b = total(1), total(2), total(0, KEPT_A), total(0, KEPT_B)
    return Overlap(
        entries=entries, chance=energy_a * energy_b / entries, both=total(0, both), conflicts=total(0, AGAINST), dot=total(3),
        energy_a=energy_a, energy_b=energy_b, both_a=total(1, both), both_b=total(2, both), conflict_a=total(1, AGAINST),
        conflict_b=total(2, AGAINST), kept_a=kept_a, kept_b=kept_b, kept_both=total(0, KEPT_A | KEPT_B),
        kept_conflicts=total(0, fight), kept_energy_a=total(1, KEPT_A), kept_energy_b=total(2, KEPT_B),
        lost_a=total(1, fight | A_YIELDS), lost_b=total(2, fight, A_YIELDS), expected_both=kept_a * kept_b / entries,
    )  # fmt: skip
