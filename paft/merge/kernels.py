"""The primitives of `ops`, `trim`, `drop` and `consensus` fused for the CPU: one visit of a tile while it is in cache.

Each kernel equals the torch form bit for bit (the order of every addition is the same, nothing is contracted), so it
changes the time of a merge and no byte of it. numba compiles them on first use and keeps the result on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paft.merge.consensus import Consensus
from paft.merge.drop import GOLDEN, MIX1, MIX2, Drop
from paft.merge.jit import CHUNK, jit
from paft.merge.ops import Plan, WeightedSum, keep
from paft.merge.rounding import add_bf16, add_f32
from paft.merge.trim import Trim

_KEEP, _TRIM, _DROP = 0, 1, 2
_SUM, _WEIGHTED, _COUNTED = 0, 1, 2
_EVERY = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Fused:
    """A plan as numbers that `_combine` reads."""

    kinds: np.ndarray
    values: np.ndarray
    lasts: np.ndarray
    keys: np.ndarray
    limits: np.ndarray
    mode: int
    weights: np.ndarray
    normalize: bool
    scale: float
    positive: bool

    def __call__(self, tiles: np.ndarray, start: int, delta: np.ndarray, base: np.ndarray,
                 counts: np.ndarray) -> np.ndarray | None:
        """``delta`` becomes the merge of ``tiles`` [n, rows, columns], and ``base`` (float32, or bfloat16 as uint16) its sum
        with it, rounded. Adds to ``counts`` (see `counters`); returns the energies of `Tally.rounded` [rows, 3], or None when
        a value overflowed.
        """
        self.combine(tiles, start, delta, counts)
        sums = np.empty((len(base), 3))
        add = add_bf16 if base.dtype == np.uint16 else add_f32
        return sums if add(delta, base, counts[-2:], sums) else None

    def combine(self, tiles: np.ndarray, start: int, delta: np.ndarray, counts: np.ndarray | None = None) -> None:
        """The first half: ``delta`` becomes the merge of ``tiles``."""
        _combine(tiles, start, self.kinds, self.values, self.lasts, self.keys, self.limits, self.mode, self.weights,
                 self.normalize, np.float32(self.scale), self.positive, delta, counters(len(tiles)) if counts is None else counts)


def counters(inputs: int) -> np.ndarray:
    """Zeros for: the non-zero entries of each input, those that its filter kept, entries whose kept signs differ, entries
    that the merge changes, and those of them that survive the rounding.
    """
    return np.zeros(2 * inputs + 3, np.int64)


def fuse(plan: Plan) -> Fused | None:
    """The plan for `_combine`, or None when one of its parts has no fused form (the torch form is then used)."""
    combine, count = plan.combine, len(plan.filters)
    if isinstance(combine, WeightedSum):
        mode, weights, normalize, scale, positive = _SUM, combine.coefficients, False, 1.0, True
    elif isinstance(combine, Consensus):
        mode = _WEIGHTED if combine.dialect.weighted else _COUNTED
        weights, normalize, scale, positive = combine.weights, combine.normalize, combine.scale, combine.positive
    else:
        return None
    kinds, values = np.zeros(count, np.int64), np.ones(count, np.float32)
    lasts, keys, limits = np.full(count, _EVERY), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for i, each in enumerate(plan.filters):
        if isinstance(each, Trim):
            kinds[i], values[i] = _TRIM, each.value
            lasts[i] = _EVERY if each.last is None else each.last
        elif isinstance(each, Drop):
            kinds[i], values[i], keys[i], limits[i] = _DROP, each.scale, each.key, each.limit
        elif each is not keep:
            return None
    return Fused(kinds, values, lasts, keys, limits, mode, np.array(weights, np.float32), normalize, scale, positive)


@jit
def _combine(tiles, start, kinds, values, lasts, keys, limits, mode, weights, normalize, scale, positive, out, counts):
    n, rows, columns = tiles.shape
    parts = np.empty((n, CHUNK), np.float32)
    total, share = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for row in range(rows):
        for first in range(0, columns, CHUNK):
            width = min(CHUNK, columns - first)
            flat = (start + row) * columns + first
            for i in range(n):
                source = tiles[i, row, first : first + width]
                if kinds[i] == _TRIM:
                    _trim_row(source, values[i], lasts[i] - flat, parts[i])
                elif kinds[i] == _DROP:
                    _drop_row(source, values[i], keys[i], limits[i], flat, parts[i])
                else:
                    parts[i, :width] = source
                counts[i] += _nonzero(source)
                counts[n + i] += _nonzero(parts[i, :width])
            target = out[row, first : first + width]
            if mode == _SUM:
                _sum_rows(parts, weights, target)
            else:
                _vote_rows(parts, weights, mode == _WEIGHTED, normalize, positive, total, share, target)
                if scale != np.float32(1):
                    for j in range(width):
                        target[j] *= scale
            if n > 1:
                counts[2 * n] += _conflicts(parts, width, total, share)


@jit
def _trim_row(source, value, last, part):
    """Keep |x| > value, and |x| = value up to the index ``last`` of this row."""
    width = source.shape[0]
    if last >= width:
        for j in range(width):
            part[j] = source[j] * np.float32(abs(source[j]) >= value)
    elif last < 0:
        for j in range(width):
            part[j] = source[j] * np.float32(abs(source[j]) > value)
    else:
        for j in range(width):
            size = abs(source[j])
            part[j] = source[j] * np.float32((size > value) | ((size == value) & (j <= last)))


@jit
def _drop_row(source, scale, key, limit, flat, part):
    for j in range(source.shape[0]):
        bits = (flat + j) * GOLDEN + key
        bits ^= (bits >> 30) & ((1 << 34) - 1)
        bits *= MIX1
        bits ^= (bits >> 27) & ((1 << 37) - 1)
        bits *= MIX2
        bits ^= (bits >> 31) & ((1 << 33) - 1)
        part[j] = source[j] * scale * np.float32(((bits >> 32) & 0xFFFFFFFF) < limit)


@jit
def _nonzero(row):
    found = np.int32(0)
    for j in range(row.shape[0]):
        found += np.int32(row[j] != 0)
    return found


@jit
def _conflicts(parts, width, high, low):
    """Entries with kept parts of both signs. Comparisons, as max() minds NaN and so does not become a vector."""
    found, first = np.int32(0), parts[0]
    if parts.shape[0] == 2:
        other = parts[1]
        for j in range(width):
            found += np.int32(((first[j] > 0) & (other[j] < 0)) | ((first[j] < 0) & (other[j] > 0)))
        return found
    high[:width] = first[:width]
    low[:width] = first[:width]
    for i in range(1, parts.shape[0]):
        other = parts[i]
        for j in range(width):
            high[j] = other[j] if other[j] > high[j] else high[j]
        for j in range(width):
            low[j] = other[j] if other[j] < low[j] else low[j]
    for j in range(width):
        found += np.int32((high[j] > 0) & (low[j] < 0))
    return found


@jit
def _sum_rows(parts, weights, target):
    for j in range(target.shape[0]):
        target[j] = parts[0, j] * weights[0]
    for i in range(1, parts.shape[0]):
        for j in range(target.shape[0]):
            target[j] += parts[i, j] * weights[i]


@jit
def _vote_rows(parts, weights, weighted, normalize, positive, total, share, target):
    n, width = parts.shape[0], target.shape[0]
    for j in range(width):
        total[j] = parts[0, j] * (weights[0] if weighted else np.float32(1))
        share[j] = 0
        target[j] = 0
    for i in range(1, n):
        weight = weights[i] if weighted else np.float32(1)
        for j in range(width):
            total[j] += parts[i, j] * weight
    for i in range(n):
        weight = weights[i]
        counted = weight if weighted else np.float32(1)
        for j in range(width):
            part = parts[i, j]
            vote = part * counted
            won = (total[j] >= 0) if positive else (total[j] > 0)
            agree = np.float32(((vote > 0) == won) & (vote != 0))
            target[j] += (part * weight) * agree
            share[j] += agree * counted
    if normalize:
        for j in range(width):
            target[j] /= share[j] + np.float32(share[j] == 0)
