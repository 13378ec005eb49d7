"""Trimming by magnitude: the exact k-th largest entry of a tensor that is never held whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paft.delta import Tiled
from paft.merge.ops import Dialect, Filter, flat_index, keep, tiles


@dataclass(frozen=True)
class Trim:
    """Keep |x| > ``value``, and of |x| = ``value`` those up to the flat index ``last`` (None: all of them)."""

    value: float
    last: int | None = None

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        size = tile.abs()
        if self.last is None:
            return tile * (size >= self.value)
        index = flat_index(tile, start)
        return tile * ((size > self.value) | ((size == self.value) & (index <= self.last)))


def trim(delta: Tiled, density: float, dialect: Dialect) -> Filter:
    """A filter that keeps the ``max(1, int(density·n))`` largest magnitudes of a tensor, equal ones in index order.

    With the dialect's ``boundary`` it keeps ``int(density·n) + 1`` and every entry equal to the last of these.
    """
    size = delta.rows * delta.columns
    if density >= 1 or size == 0:
        return keep
    if dialect.boundary:
        return Trim(_select(delta, min(size, int(density * size) + 1))[0])
    count = max(1, int(density * size))
    value, above, equal = _select(delta, count)
    if value == 0 or above + equal == count:  # zeros contribute nothing, kept or not
        return Trim(value)
    return Trim(value, _nth_equal(delta, value, count - above))


def _select(delta: Tiled, count: int) -> tuple[float, int, int]:
    """The ``count``-th largest magnitude, exactly; how many entries are larger; how many are equal.

    Two passes: a histogram of the top 16 bits of |x| (ordered as |x| is), then the entries of the one bin that holds
    the value. A bin is at most 1/128 of its value wide in float32, so it holds a small share of the entries.
    """
    histogram = torch.zeros(1 << 15, dtype=torch.int64)
    for _, tile in tiles(delta):
        histogram += torch.bincount(_top_bits(tile), minlength=1 << 15)
    reached = histogram.flip(0).cumsum(0)
    from_top = int(torch.searchsorted(reached, torch.tensor(count)))
    chosen = (1 << 15) - 1 - from_top
    above = int(reached[from_top] - histogram[chosen])
    inside = torch.cat([tile.flatten().abs()[_top_bits(tile) == chosen] for _, tile in tiles(delta)])
    value = inside.kthvalue(len(inside) - (count - above) + 1).values
    return float(value), above + int((inside > value).sum()), int((inside == value).sum())


def _top_bits(tile: torch.Tensor) -> torch.Tensor:
    wide = tile.dtype == torch.float64
    bits = tile.contiguous().flatten().view(torch.int64 if wide else torch.int32)
    return (bits >> (48 if wide else 16)) & 0x7FFF


def _nth_equal(delta: Tiled, value: float, count: int) -> int:
    """The flat index of the ``count``-th entry whose magnitude is ``value``."""
    for start, tile in tiles(delta):
        where = (tile.flatten().abs() == value).nonzero().flatten()
        if count <= len(where):
            return start * delta.columns + int(where[count - 1])
        count -= len(where)
    raise AssertionError("the passes over a delta disagree")
