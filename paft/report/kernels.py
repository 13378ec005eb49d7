"""The passes of the reports over a tile, compiled; each equals the plain form in `scan` and `overlap`."""

from __future__ import annotations

import numpy as np

from paft.merge.jit import CHUNK, jit
from paft.report.histogram import BINS, FIRST, SHIFT

_LAST = BINS - 1
_LANES = 4


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
def add_pair(a, b, limit_a, limit_b, table):
    """`overlap.plain`, in chunks of columns; the sums are added in another order."""
    rows, columns = a.shape
    place = np.empty(CHUNK, np.int32)
    for row in range(rows):
        for first in range(0, columns, CHUNK):
            x, y = a[row, first : first + CHUNK], b[row, first : first + CHUNK]
            _classify(x, y, limit_a, limit_b, place)
            for j in range(x.shape[0]):
                k, lane = place[j], j % _LANES
                u, v = np.float64(x[j]), np.float64(y[j])
                table[k, lane, 0] += 1.0
                table[k, lane, 1] += u * u
                table[k, lane, 2] += v * v
                table[k, lane, 3] += u * v


@jit
def _classify(x, y, limit_a, limit_b, place):
    """The classes of `overlap`, bit by bit in its order."""
    for j in range(x.shape[0]):
        u, v = x[j], y[j]
        p, q = abs(u), abs(v)
        in_a, in_b = u != 0, v != 0
        k = np.int32(in_a) + (np.int32(in_b) << 1)
        k += (np.int32(in_a & (p >= limit_a)) << 2) + (np.int32(in_b & (q >= limit_b)) << 3)
        k += np.int32(in_a & in_b & ((u > 0) != (v > 0))) << 4
        place[j] = k + (np.int32((p < q) | ((p == q) & (u < 0))) << 5)
