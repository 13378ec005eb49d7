"""Trimming by magnitude: the largest entries of a tensor, or those below its outliers, in a tensor never held whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Dialect, Filter, PerAdapter, densities, flat_index, keep, numbers, total
from paft.merge.select import select


@dataclass(frozen=True)
class Trim:
    """Keep |x| > ``value``, and of |x| = ``value`` those up to the flat index ``last`` (None: all of them)."""

    value: float
    last: int | None = None

    def mask(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        size = tile.abs()
        if self.last is None:
            return size >= self.value
        if self.last < 0:
            return size > self.value
        index = flat_index(tile, start)
        return (size > self.value) | ((size == self.value) & (index <= self.last))

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        return tile * self.mask(tile, start)


@dataclass(frozen=True)
class Between:
    """Keep what ``wide`` keeps and ``narrow`` does not: the outliers go, and the small ones."""

    wide: Trim
    narrow: Trim

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        return tile * (self.wide.mask(tile, start) & ~self.narrow.mask(tile, start))


@dataclass(frozen=True)
class Scaled:
    """Another filter, times a number."""

    inner: Filter
    scale: float

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        return self.inner(tile, start) * self.scale


def trimmed(
    deltas: Sequence[Tiled],
    density: PerAdapter,
    dialect: Dialect,
    *,
    gamma: PerAdapter = 0.0,
    rescale: bool = False,
    trims: Sequence[Filter] | None = None,
) -> list[Filter]:
    """One filter per delta: those handed in as ``trims``, or each tensor's own; ``rescale`` restores the L1 norms.

    Raises UsageError for a density outside (0, 1], a gamma outside [0, 1), or a list of the wrong length.
    """
    shares, skipped = densities(density, len(deltas)), gammas(gamma, len(deltas))
    if trims is None:
        trims = [trim(delta, share, dialect, skip) for delta, share, skip in zip(deltas, shares, skipped, strict=True)]
    return [_restored(delta, each) for delta, each in zip(deltas, trims, strict=True)] if rescale else list(trims)


def trim(delta: Tiled, density: float, dialect: Dialect, gamma: float = 0.0) -> Filter:
    """A filter that keeps the ``max(1, int(density·n))`` largest magnitudes of a tensor, equal ones in index order.

    ``gamma`` drops the ``int(gamma·n)`` largest first (fewer where else too few would be left), as breadcrumbs does.
    With the dialect's ``boundary`` it keeps ``int(density·n) + 1`` and every entry equal to the last of these.
    """
    size = delta.rows * delta.columns
    if density >= 1 or size == 0:
        return keep
    skipped, reached = ranks(size, density, dialect, gamma)
    wide = top(delta, reached, equals=dialect.boundary)
    return Between(wide, top(delta, skipped)) if skipped else wide


def ranks(size: int, density: float, dialect: Dialect, gamma: float) -> tuple[int, int]:
    """How many of ``size`` magnitudes, the largest first, come before those that are kept, and with them."""
    count = min(size, int(density * size) + 1) if dialect.boundary else max(1, int(density * size))
    skipped = min(int(gamma * size), size - count)
    return skipped, skipped + count


def top(delta: Tiled, count: int, *, equals: bool = False) -> Trim:
    """A filter that keeps the ``count`` largest magnitudes; with ``equals`` every one that is equal to the last too."""
    found = select(delta, count)
    missing = count - found.above
    if equals or found.value == 0 or missing == len(found.places):  # zeros contribute nothing, kept or not
        return Trim(found.value)
    return Trim(found.value, int(found.places[missing - 1]))


def gammas(value: PerAdapter, count: int) -> list[float]:
    """One gamma per adapter; raises UsageError outside [0, 1) or for a wrong length."""
    values = numbers("gamma", value, count)
    for each in values:
        if not 0 <= each < 1:
            raise UsageError(f"gamma must be in [0, 1), not {each}", hint="gamma is the share of largest entries that is dropped")
    return values


def _restored(delta: Tiled, inner: Filter) -> Filter:
    """The filter, scaled so that the delta keeps its L1 norm."""
    after = total(delta, lambda tile, start: inner(tile, start).abs())
    return Scaled(inner, total(delta, lambda tile, start: tile.abs()) / after) if after else inner
