"""A histogram of magnitudes with exact sums in each bin: whatever depends on the distribution of |δ|, and its bound.

Bins are those of the float64 format: 64 of equal width in each octave [2^e, 2^(e+1)), so a bin's upper edge is at most
1/64 above its lower one. Each holds the number, the sum and the sum of squares of its entries, exactly but for float64
rounding. Norms then are exact; what depends on the order inside a bin (quantiles, Gini) lies between two values that the
sums allow: their middle is reported, with half their distance as the bound (`Bounded`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FINE = 6  # bits of the mantissa that count: 64 bins an octave
LOWEST, HIGHEST = -320, 260  # octaves; a product of two float32 numbers lies in [2^-298, 2^256]
SHIFT = 52 - FINE
FIRST = (1023 + LOWEST) << FINE  # what the first bin's edge has as its top bits
BINS = (HIGHEST - LOWEST) << FINE
COUNT, SUM, SQUARES = 0, 1, 2


class Bounded(NamedTuple):
    """A number and how far at most the exact one is from it."""

    value: float
    bound: float


def table() -> np.ndarray:
    """An empty table for `scan`: [bins, 4], the columns being count, sum, sum of squares and nothing (a whole vector)."""
    return np.zeros((BINS, 4))


@dataclass(frozen=True)
class Histogram:
    """Magnitudes of ``entries`` numbers; row i of ``bins`` [n, 3] is bin ``first + i``. What is in no bin is zero."""

    entries: int
    first: int
    bins: np.ndarray

    @classmethod
    def of(cls, entries: int, full: np.ndarray) -> Histogram:
        """From a table as `scan` fills it, cut to what is used."""
        used = np.flatnonzero(full[:, COUNT])
        if not len(used):
            return cls(entries, 0, np.zeros((0, 3)))
        return cls(entries, int(used[0]), full[used[0] : used[-1] + 1, :3].copy())

    def __add__(self, other: Histogram) -> Histogram:
        """Both sets of entries together."""
        entries = self.entries + other.entries
        if not len(self.bins) or not len(other.bins):
            one = self if len(self.bins) else other
            return Histogram(entries, one.first, one.bins)
        first = min(self.first, other.first)
        last = max(self.first + len(self.bins), other.first + len(other.bins))
        bins = np.zeros((last - first, 3))
        for one in (self, other):
            bins[one.first - first : one.first - first + len(one.bins)] += one.bins
        return Histogram(entries, first, bins)

    @property
    def edges(self) -> np.ndarray:
        """Lower edges of the bins and the upper edge of the last, [n + 1]."""
        return edges(np.arange(self.first, self.first + len(self.bins) + 1))

    @property
    def l1(self) -> float:
        return float(self.bins[:, SUM].sum())

    @property
    def sumsq(self) -> float:
        return float(self.bins[:, SQUARES].sum())

    def share_below(self, threshold: float) -> Bounded:
        """|{ |x| < threshold }| / N; inside the bin of the threshold entries are taken as evenly spread."""
        bound = self.edges
        whole = int(np.searchsorted(bound[1:], threshold, side="right")) if len(self.bins) else 0
        count = self.entries - float(self.bins[whole:, COUNT].sum())
        if whole == len(self.bins) or threshold <= bound[whole]:
            return Bounded(count / self.entries, 0.0)
        inside = float(self.bins[whole, COUNT])
        part = (threshold - bound[whole]) / (bound[whole + 1] - bound[whole])
        return Bounded((count + part * inside) / self.entries, max(part, 1 - part) * inside / self.entries)

    def energy_below(self, threshold: float) -> Bounded:
        """Share of Σx² in entries below the threshold (0 of an empty one): half of its bin's is its value's bound."""
        if not self.sumsq:
            return Bounded(0.0, 0.0)
        bound = self.edges
        whole = int(np.searchsorted(bound[1:], threshold, side="right"))
        below = float(self.bins[:whole, SQUARES].sum())
        half = float(self.bins[whole, SQUARES]) / 2 if whole < len(self.bins) and threshold > bound[whole] else 0.0
        return Bounded((below + half) / self.sumsq, half / self.sumsq)

    def holding(self, share: float) -> Bounded | None:
        """d90 for ``share`` 0.9: the smallest share of entries that holds this share of Σx²; None for a zero delta.

        Of the bin where the sum is reached, with n entries and energy E, the largest m hold at least m·E/n and at most
        m·edge²; that is the bound.
        """
        if not self.sumsq:
            return None
        from_top = self.bins[::-1]
        reached = np.cumsum(from_top[:, SQUARES])
        place = min(int(np.searchsorted(reached, share * self.sumsq)), len(reached) - 1)
        above = float(from_top[:place, COUNT].sum())
        missing = share * self.sumsq - (float(reached[place - 1]) if place else 0.0)
        count, energy = float(from_top[place, COUNT]), float(from_top[place, SQUARES])
        edge = float(self.edges[len(self.bins) - place])
        least, most = min(missing / edge**2, count), min(math.ceil(count * missing / energy), count)
        return Bounded((above + (least + most) / 2) / self.entries, (most - least) / 2 / self.entries)

    @property
    def gini(self) -> Bounded | None:
        """Σ_ij |x_i - x_j| / (2 N Σx): 0 all equal, 1 - 1/N one entry; None for a zero delta.

        Between bins it is exact. Inside a bin [lo, hi] with mean μ it is at most (hi - μ)(μ - lo) / (μ (hi - lo)), which
        is reached where all entries stand on the edges.
        """
        total = self.l1
        if not total:
            return None
        people, wealth = self.bins[:, COUNT] / self.entries, self.bins[:, SUM] / total
        before = np.cumsum(wealth) - wealth
        between = 1 - float((people * (2 * before + wealth)).sum())  # zeros come first and hold nothing
        low, high = self.edges[:-1], self.edges[1:]
        mean = np.divide(self.bins[:, SUM], self.bins[:, COUNT], out=low.copy(), where=self.bins[:, COUNT] > 0)
        inside = np.clip((high - mean) * (mean - low), 0, None) / (mean * (high - low))
        most = float((people * wealth * inside).sum())
        return Bounded(between + most / 2, most / 2)

    def octaves(self, parts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(lower edges, counts) in bins of 1/``parts`` octave (1, 2, 4 ... 64), from the first used to the last."""
        width = (1 << FINE) // parts
        start = self.first // width
        where = np.arange(self.first, self.first + len(self.bins)) // width - start
        counts = np.bincount(where, self.bins[:, COUNT]) if len(self.bins) else np.zeros(0)
        return edges((start + np.arange(len(counts))) * width), counts


def edges(numbers: np.ndarray) -> np.ndarray:
    """Lower edges of bins by their number."""
    return ((numbers.astype(np.int64) + FIRST) << SHIFT).view(np.float64)
