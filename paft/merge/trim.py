"""Trimming by magnitude: the exact k-th largest entry of a tensor, or of a whole model, that is never held whole.

Magnitudes are ranked with the largest first, equal ones in index order, and over a model in the order of the tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paft.delta import Delta, Tiled
from paft.errors import UsageError
from paft.merge.ops import Dialect, Filter, PerAdapter, densities, find_dialect, flat_index, keep, numbers, tiles, total

Tensors = Callable[[], Iterable[tuple[str, Tiled]]]
_DIGIT = 16


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


def trim(delta: Tiled, density: float, dialect: Dialect, gamma: float = 0.0) -> Filter:
    """A filter that keeps the ``max(1, int(density·n))`` largest magnitudes of a tensor, equal ones in index order.

    ``gamma`` drops the ``int(gamma·n)`` largest first (fewer where else too few would be left), as breadcrumbs does.
    With the dialect's ``boundary`` it keeps ``int(density·n) + 1`` and every entry equal to the last of these.
    """
    return global_trims(lambda: [("", delta)], density, dialect, gamma)[""]


def global_trims(tensors: Tensors, density: float, dialect: Dialect, gamma: float = 0.0) -> dict[str, Filter]:
    """`trim` with one threshold for all the tensors: each tensor's filter by its name.

    ``tensors`` is called once for each pass. Two passes over float32 find the threshold, a third one shares out
    magnitudes equal to it. Memory is one tile and a histogram, whatever the model.
    """
    sizes = {name: tensor.rows * tensor.columns for name, tensor in tensors()}
    size = sum(sizes.values())
    if density >= 1 or size == 0:
        return dict.fromkeys(sizes, keep)
    count = min(size, int(density * size) + 1) if dialect.boundary else max(1, int(density * size))
    skipped = min(int(gamma * size), size - count)
    wide = cut(tensors, skipped + count, equals=dialect.boundary)
    if not skipped:
        return dict(wide)
    narrow = cut(tensors, skipped)
    return {name: Between(wide[name], narrow[name]) for name in wide}


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


def gammas(value: PerAdapter, count: int) -> list[float]:
    """One gamma per adapter; raises UsageError outside [0, 1) or for a wrong length."""
    values = numbers("gamma", value, count)
    for each in values:
        if not 0 <= each < 1:
            raise UsageError(f"gamma must be in [0, 1), not {each}", hint="gamma is the share of largest entries that is dropped")
    return values


def model_trims(
    deltas: Sequence[Delta], parameters: dict[str, Any], dialect: str, elements: int
) -> dict[str, list[Filter]] | None:
    """For a method whose ``scope`` is ``global``: by tensor, the trimming filter of every delta. None for other scopes.

    The model is what a delta touches: for an adapter its target tensors, for a fine-tuned model every float tensor.
    Tensors are ordered by name, so that neither the shards nor the order inside an adapter's file matter.
    """
    rules = find_dialect(dialect)
    if "scope" not in parameters or not (rules.whole if parameters["scope"] is None else parameters["scope"] == "global"):
        return None
    shares, skipped = densities(parameters["density"], len(deltas)), gammas(parameters.get("gamma", 0.0), len(deltas))
    found: dict[str, list[Filter]] = {name: [keep] * len(deltas) for delta in deltas for name in delta.names}
    for place, (delta, share, skip) in enumerate(zip(deltas, shares, skipped, strict=True)):

        def tensors(delta: Delta = delta) -> Iterable[tuple[str, Tiled]]:
            return ((name, delta.tensor(name, elements)) for name in sorted(delta.names))

        for name, each in global_trims(tensors, share, rules, skip).items():
            found[name][place] = each
    return found


def cut(tensors: Tensors, count: int, *, equals: bool = False) -> dict[str, Trim]:
    """Filters that keep the ``count`` largest magnitudes of all the tensors; with ``equals`` also those that tie."""
    value, above, equal = _select(tensors, count)
    if equals or value == 0 or above + equal == count:  # zeros contribute nothing, kept or not
        return {name: Trim(value) for name, _ in tensors()}
    found: dict[str, Trim] = {}
    left = count - above
    for name, tensor in tensors():
        found[name] = Trim(value, -1)
        for start, tile in tiles(tensor) if left else ():
            where = (tile.flatten().abs() == value).nonzero().flatten()
            if len(where):
                found[name] = Trim(value, start * tensor.columns + int(where[min(left, len(where)) - 1]))
                left -= min(left, len(where))
            if not left:
                break
    return found


def _select(tensors: Tensors, count: int) -> tuple[float, int, int]:
    """The ``count``-th largest magnitude, exactly; how many entries are larger; how many are equal.

    A radix search: |x| is ordered as its bits are, so each pass fixes the next 16 of them by a histogram of the
    entries that agree in those before. Two passes for float32.
    """
    above, prefix, value = 0, 0, torch.zeros(1)
    for level in itertools.count():
        histogram, shift = torch.zeros(1 << _DIGIT, dtype=torch.int64), 0
        for _, tensor in tensors():
            for _, tile in tiles(tensor):
                size = tile.abs().contiguous().flatten()
                value = value.to(size.dtype)
                bits = size.view(torch.int64 if size.element_size() == 8 else torch.int32)
                shift = 8 * size.element_size() - _DIGIT * (level + 1)
                if level:
                    bits = bits[(bits >> (shift + _DIGIT)) == prefix]
                histogram += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << _DIGIT)
        below = histogram.cumsum(0)
        rank = int(below[-1]) - (count - above)  # of the value among the entries counted, the smallest first
        digit = int(torch.searchsorted(below, rank, right=True))
        above += int(below[-1] - below[digit])
        prefix = prefix << _DIGIT | digit
        if not shift:
            kind = torch.int64 if value.element_size() == 8 else torch.int32
            return float(torch.tensor([prefix], dtype=kind).view(value.dtype)), above, int(histogram[digit])
    raise AssertionError("a float has bits")


def _restored(delta: Tiled, inner: Filter) -> Filter:
    """The filter, scaled so that the delta keeps its L1 norm."""
    after = total(delta, lambda tile, start: inner(tile, start).abs())
    return Scaled(inner, total(delta, lambda tile, start: tile.abs()) / after) if after else inner
