"""Trimming by magnitude: the exact k-th largest entry of a tensor that is never held whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paft.delta import Tiled
from paft.merge.ops import Dialect, Filter, flat_index, keep
from paft.merge.select import select


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
        return Trim(select(delta, min(size, int(density * size) + 1)).value)
    count = max(1, int(density * size))
    found = select(delta, count)
    if found.value == 0 or found.above + len(found.places) == count:  # zeros contribute nothing, kept or not
        return Trim(found.value)
    return Trim(found.value, int(found.places[count - found.above - 1]))
