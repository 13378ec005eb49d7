"""``out = round(W + D)`` for float32 and bfloat16, compiled, with the counts of `Tally.rounded`."""

from __future__ import annotations

import numpy as np

from paft.merge.jit import CHUNK, jit, jit_lanes


@jit
def add_bf16(delta, base, counts, sums):
    rows, columns = delta.shape
    wide, moved = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    bits, old = wide.view(np.uint32), moved.view(np.uint32)
    finite = True
    for row in range(rows):
        sums[row] = 0
        for first in range(0, columns, CHUNK):
            change, weight = delta[row, first : first + CHUNK], base[row, first : first + CHUNK]
            width = change.shape[0]
            for j in range(width):
                old[j] = np.uint32(weight[j]) << np.uint32(16)
            for j in range(width):
                wide[j] = moved[j] + change[j]
            worst = np.uint32(0)
            for j in range(width):
                word = bits[j]
                word = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                zero = (change[j] == 0) & (moved[j] == 0)
                word = np.uint32(weight[j]) if zero else word
                worst = max(worst, word & np.uint32(0x7FFF))
                weight[j] = np.uint16(word)
                bits[j] = word << np.uint32(16)
            finite &= worst < np.uint32(0x7F80)
            for j in range(width):
                moved[j] = wide[j] - moved[j]
            _tally_row(change, moved, counts, sums[row])
    return finite


@jit
def add_f32(delta, base, counts, sums):
    rows, columns = delta.shape
    wide, moved = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    bits = wide.view(np.uint32)
    finite = True
    for row in range(rows):
        sums[row] = 0
        for first in range(0, columns, CHUNK):
            change, weight = delta[row, first : first + CHUNK], base[row, first : first + CHUNK]
            width = change.shape[0]
            for j in range(width):
                old = weight[j]
                new = old + change[j]
                new = old if (change[j] == 0) & (old == 0) else new
                weight[j] = new
                wide[j] = new
                moved[j] = new - old
            worst = np.uint32(0)
            for j in range(width):  # as bits, because a maximum of floats loses NaN
                worst = max(worst, bits[j] & np.uint32(0x7FFFFFFF))
            finite &= worst < np.uint32(0x7F800000)
            _tally_row(change, moved, counts, sums[row])
    return finite


@jit
def _tally_row(change, moved, counts, sums):
    changed, survived = np.int32(0), np.int32(0)
    for j in range(change.shape[0]):
        changed += np.int32(change[j] != 0)
        survived += np.int32((change[j] != 0) & (moved[j] != 0))
    counts[0] += changed
    counts[1] += survived
    energy, landed, error = _energies(change, moved)
    sums[0] += energy
    sums[1] += landed
    sums[2] += error


@jit_lanes
def _energies(change, moved):
    energy = landed = error = 0.0
    for j in range(change.shape[0]):
        square = np.float64(change[j] * change[j])
        miss = moved[j] - change[j]
        energy += square
        landed += square if moved[j] != 0 else 0.0
        error += np.float64(miss * miss)
    return energy, landed, error
