"""The passes of the reports over a tile, compiled; each equals the plain form in `scan` and `overlap`."""

from __future__ import annotations

import numpy as np

from paft.merge.jit import CHUNK, jit, jit_lanes
from paft.report.histogram import BINS, FIRST, SHIFT

_LAST = BINS - 1


@jit
def add_block(block, scale, threshold, table, row_used, column_used, counts):
    """`scan.plain`, in chunks of columns that stay in the first-level cache."""
    rows, columns = block.shape
    size, place = np.empty(CHUNK, np.float64), np.empty(CHUNK, np.int32)
    bits = size.view(np.int64)
    largest = 0.0
    for row in range(rows):
        filled = False
        for first in range(0, columns, CHUNK):
            source, flags = block[row, first : first + CHUNK], column_used[first : first + CHUNK]
            width = source.shape[0]
            below, below_scaled, zeros = np.int32(0), np.int32(0), np.int32(0)
            for j in range(width):
                x = abs(np.float64(source[j]))
                y = x * scale
                below += np.int32(x < threshold)
                below_scaled += np.int32(y < threshold)
                zeros += np.int32(x == 0)
                flags[j] |= x != 0
                size[j] = y
            filled |= zeros < width
            counts[0] += below
            counts[1] += below_scaled
            counts[2] += zeros
            for j in range(width):
                largest = size[j] if size[j] > largest else largest
            for j in range(width):
                k = (bits[j] >> SHIFT) - FIRST
                k = k if k > 0 else 0
                place[j] = np.int32(k if k < _LAST else _LAST)
            if zeros:
                _add_nonzero(size, place, width, table)
            else:
                _add_all(size, place, width, table)
        row_used[row] |= filled
    return largest


@jit
def _add_all(size, place, width, table):
    for j in range(width):
        k, x = place[j], size[j]
        table[k, 0] += 1.0
        table[k, 1] += x
        table[k, 2] += x * x
        table[k, 3] += 0.0  # four numbers are one vector


@jit
def _add_nonzero(size, place, width, table):
    for j in range(width):
        k, x = place[j], size[j]
        table[k, 0] += 1.0 if x != 0 else 0.0
        table[k, 1] += x
        table[k, 2] += x * x
        table[k, 3] += 0.0


@jit
def add_pair(a, b, limit_a, limit_b, sums):
    """`overlap.plain`, row by row; the sums may be added in another order."""
    for row in range(a.shape[0]):
        _add_energies(a[row], b[row], sums)
        _add_kept(a[row], b[row], limit_a, limit_b, sums)


@jit_lanes
def _add_energies(a, b, sums):
    both, conflicts = np.int32(0), np.int32(0)
    dot = energy_a = energy_b = both_a = both_b = conflict_a = conflict_b = 0.0
    for j in range(a.shape[0]):
        x, y = np.float64(a[j]), np.float64(b[j])
        met = (x != 0) & (y != 0)
        against = met & ((x > 0) != (y > 0))
        both += np.int32(met)
        conflicts += np.int32(against)
        dot += x * y
        energy_a += x * x
        energy_b += y * y
        both_a += x * x if met else 0.0
        both_b += y * y if met else 0.0
        conflict_a += x * x if against else 0.0
        conflict_b += y * y if against else 0.0
    sums[0] += both
    sums[1] += conflicts
    sums[2] += dot
    sums[3] += energy_a
    sums[4] += energy_b
    sums[5] += both_a
    sums[6] += both_b
    sums[7] += conflict_a
    sums[8] += conflict_b


@jit_lanes
def _add_kept(a, b, limit_a, limit_b, sums):
    kept_a, kept_b, met, fights = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    energy_a = energy_b = lost_a = lost_b = 0.0
    for j in range(a.shape[0]):
        x, y = a[j], b[j]
        size_x, size_y = abs(x), abs(y)
        keep_x, keep_y = (size_x >= limit_a) & (x != 0), (size_y >= limit_b) & (y != 0)
        both = keep_x & keep_y
        fight = both & ((x > 0) != (y > 0))
        x_loses = fight & ((size_x < size_y) | ((size_x == size_y) & (x < 0)))
        square_x, square_y = np.float64(x) * np.float64(x), np.float64(y) * np.float64(y)
        kept_a += np.int32(keep_x)
        kept_b += np.int32(keep_y)
        met += np.int32(both)
        fights += np.int32(fight)
        energy_a += square_x if keep_x else 0.0
        energy_b += square_y if keep_y else 0.0
        lost_a += square_x if x_loses else 0.0
        lost_b += square_y if fight & (not x_loses) else 0.0
    sums[9] += kept_a
    sums[10] += kept_b
    sums[11] += met
    sums[12] += fights
    sums[13] += energy_a
    sums[14] += energy_b
    sums[15] += lost_a
    sums[16] += lost_b
