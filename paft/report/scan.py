"""One pass over the tiles of a delta: counts, histogram, empty rows and columns. The plain form; `kernels` has the fast one.

Both forms add the same numbers in the same order, so they agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paft.report.histogram import BINS, FIRST, SHIFT, Histogram, table

FUSED_FROM = 1 << 17  # entries; a smaller tensor is done before numba is loaded
Block = tuple[int, int, np.ndarray]  # first row, first column, entries [rows, columns] in float64 or float32


@dataclass
class Scan:
    """What a pass over δ finds; ``below`` counts |δ| < t, ``below_scaled`` |s·δ| < t, the histogram and ``max`` are of s·δ."""

    rows: int
    columns: int
    below: int = 0
    below_scaled: int = 0
    zeros: int = 0
    max: float = 0.0
    table: np.ndarray = field(default_factory=table)
    row_used: np.ndarray = field(init=False)
    column_used: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.row_used, self.column_used = np.zeros(self.rows, np.bool_), np.zeros(self.columns, np.bool_)

    @property
    def histogram(self) -> Histogram:
        return Histogram.of(self.rows * self.columns, self.table)


    def add(self, row: int, column: int, block: np.ndarray, scale: float, threshold: float) -> None:
        """Add a block whose first entry stands at this row and column."""
        height, width = block.shape
        count: Callable[..., Any] = plain
        if self.rows * self.columns >= FUSED_FROM:
            from paft.report.kernels import add_block as count
        counts = np.zeros(3, np.int64)
        used = self.row_used[row : row + height], self.column_used[column : column + width]
        largest = count(block, scale, threshold, self.table, *used, counts)
        self.below += int(counts[0])
        self.below_scaled += int(counts[1])
        self.zeros += int(counts[2])
        self.max = max(self.max, float(largest))


def scan(rows: int, columns: int, blocks: Iterable[Block], scale: float, threshold: float) -> Scan:
    """All blocks of a tensor, which cover it once; ``scale`` is s, not negative."""
    found = Scan(rows, columns)
    for block in blocks:
        found.add(*block, scale, threshold)
    return found


def plain(block: np.ndarray, scale: float, threshold: float, into: np.ndarray, row_used: np.ndarray, column_used: np.ndarray,
          counts: np.ndarray) -> float:
    """Add a block to the table, the flags and the counts of below, below scaled and zeros; returns the largest |s·δ|."""
    size = np.abs(block.astype(np.float64))
    counts += (np.count_nonzero(size < threshold), np.count_nonzero(size * scale < threshold), np.count_nonzero(size == 0))
    row_used |= (size != 0).any(axis=1)
    column_used |= (size != 0).any(axis=0)
    flat = (size * scale).ravel()
    flat = flat[flat != 0]
    places = np.clip((flat.view(np.int64) >> SHIFT) - FIRST, 0, BINS - 1)
    np.add.at(into[:, 0], places, 1.0)
    np.add.at(into[:, 1], places, flat)
    np.add.at(into[:, 2], places, flat * flat)
    return float(flat.max(initial=0.0))
