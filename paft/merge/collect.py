"""The pass of `select` over a tile, compiled."""

from __future__ import annotations

import numpy as np

from paft.merge.jit import jit

_SIZE = np.uint32(0x7FFFFFFF)  # all bits of a float32 but its sign


@jit
def collect(tile, low, high, first, sizes, places, filled):
    """Count |x| > high in a tile, and append |x| and flat index of low <= |x| <= high; stops storing when full.

    Magnitudes are compared as their bits (uint32), which have the same order.
    """
    rows, columns = tile.shape
    above, span, whole = 0, np.uint32(high - low), columns // 32
    near = np.empty(whole, np.int32)
    for row in range(rows):
        source, flat = tile[row], first + row * columns
        if filled + columns > sizes.shape[0]:
            return above, sizes.shape[0] + 1
        over = np.int32(0)
        for k in range(whole):
            found = np.int32(0)
            for j in range(32):
                size = source[32 * k + j] & _SIZE
                over += np.int32(size > high)
                found += np.int32(size - low <= span)
            near[k] = found
        for k in range(whole):
            if near[k]:  # stored without a branch: which of the 32 it is cannot be predicted
                for j in range(32):
                    size = source[32 * k + j] & _SIZE
                    sizes[filled] = size
                    places[filled] = flat + 32 * k + j
                    filled += np.int64(size - low <= span)
        for j in range(32 * whole, columns):
            size = source[j] & _SIZE
            over += np.int32(size > high)
            sizes[filled] = size
            places[filled] = flat + j
            filled += np.int64(size - low <= span)
        above += over
    return above, filled
