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
    above, span = 0, np.uint32(high - low)
    for row in range(rows):
        source, flat = tile[row], first + row * columns
        over, whole = np.int32(0), columns // 32 * 32
        if filled + columns > sizes.shape[0]:
            return above, sizes.shape[0] + 1
        for begin in range(0, whole, 32):
            near = np.int32(0)
            for j in range(32):
                size = source[begin + j] & _SIZE
                over += np.int32(size > high)
                near += np.int32(size - low <= span)
            if near:
                for j in range(32):
                    size = source[begin + j] & _SIZE
                    if size - low <= span:
                        sizes[filled] = size
                        places[filled] = flat + begin + j
                        filled += 1
        for j in range(whole, columns):
            size = source[j] & _SIZE
            over += np.int32(size > high)
            if size - low <= span:
                sizes[filled] = size
                places[filled] = flat + j
                filled += 1
        above += over
    return above, filled
