"""Trimming over a whole model: one threshold for all tensors of an adapter, none of which is ever dense.

Magnitudes are ranked with the largest first, equal ones in the order of the tensors and then of the indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from paft.delta import Delta, Tiled
from paft.errors import UsageError
from paft.merge.ops import Dialect, Filter, densities, find_dialect, keep, tiles
from paft.merge.trim import Between, Trim, gammas, ranks

Tensors = Callable[[], Iterable[tuple[str, Tiled]]]
Counts = tuple[torch.Tensor, int]  # how many entries have each value of a digit, and how many bytes an entry has
Count = Callable[[int, int], Counts]  # of the digit at a level, over the entries whose digits before are the prefix
_DIGIT = 16  # bits that a pass fixes


def model_trims(
    deltas: Sequence[Delta], parameters: Iterable[dict[str, Any]], dialect: str, elements: int,
    counting: Callable[[int], Count] | None = None,
) -> dict[str, list[Filter]] | None:
    """For a method whose ``scope`` is ``global``: by tensor, the trimming filter of every delta. None for other scopes.

    The model is what a delta touches: for an adapter its target tensors, for a fine-tuned model every float tensor.
    Tensors are ordered by name, so that neither the shards nor the order inside an adapter's file matter.
    ``counting``: who counts the entries of the i-th delta, where that is not done here (`paft.merge.spread`).
    ``parameters`` are the method's, as often as they differ over the model: raises UsageError where one threshold
    cannot serve them all.
    """
    rules = find_dialect(dialect)
    asked = [(each.get("scope", "tensor"), each.get("density", 1.0), each.get("gamma", 0.0)) for each in parameters]
    if not any(rules.whole if scope is None else scope == "global" for scope, _, _ in asked):
        return None
    if any(each != asked[0] for each in asked):
        raise UsageError("scope: global is one threshold for the model: scope, density and gamma must not vary over it",
                         hint="give each adapter one density, or set scope: tensor")  # fmt: skip
    shares, skipped = densities(asked[0][1], len(deltas)), gammas(asked[0][2], len(deltas))
    found: dict[str, list[Filter]] = {name: [keep] * len(deltas) for delta in deltas for name in delta.names}
    for place, (delta, share, skip) in enumerate(zip(deltas, shares, skipped, strict=True)):

        def tensors(delta: Delta = delta) -> Iterable[tuple[str, Tiled]]:
            return ((name, delta.tensor(name, elements)) for name in sorted(delta.names))

        for name, each in global_trims(tensors, share, rules, skip, counting and counting(place)).items():
            found[name][place] = each
    return found


def global_trims(tensors: Tensors, density: float, dialect: Dialect, gamma: float = 0.0,
                 count: Count | None = None) -> dict[str, Filter]:
    """`trim.trim` with one threshold for all the tensors: each tensor's filter by its name.

    ``tensors`` is called once for each pass. Two passes over float32 find the threshold, which ``count`` makes in our stead if
    given; a third one shares out magnitudes equal to it. Memory is one tile and a histogram, whatever the model.
    """
    sizes = {name: tensor.rows * tensor.columns for name, tensor in tensors()}
    size = sum(sizes.values())
    if density >= 1 or size == 0:
        return dict.fromkeys(sizes, keep)
    skipped, reached = ranks(size, density, dialect, gamma)
    counted = count or partial(histogram, tensors)
    wide = _top(tensors, counted, reached, equals=dialect.boundary)
    if not skipped:
        return dict(wide)
    narrow = _top(tensors, counted, skipped)
    return {name: Between(wide[name], narrow[name]) for name in wide}


def _top(tensors: Tensors, counted: Count, count: int, *, equals: bool = False) -> dict[str, Trim]:
    """`trim.top` over all the tensors."""
    value, above, equal = _select(counted, count)
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


def _select(counted: Count, count: int) -> tuple[float, int, int]:
    """The ``count``-th largest magnitude, exactly; how many entries are larger; how many are equal.

    A radix search: |x| is ordered as its bits are, so each pass fixes the next 16 of them by a histogram of the
    entries that agree in those before. Two passes for float32.
    """
    above, prefix = 0, 0
    for level in itertools.count():
        found, width = counted(level, prefix)
        below = found.cumsum(0)
        rank = int(below[-1]) - (count - above)  # of the value among the entries counted, the smallest first
        digit = int(torch.searchsorted(below, rank, right=True))
        above += int(below[-1] - below[digit])
        prefix = prefix << _DIGIT | digit
        if _DIGIT * (level + 1) == 8 * width:
            bits, kind = (torch.int64, torch.float64) if width == 8 else (torch.int32, torch.float32)
            return float(torch.tensor([prefix], dtype=bits).view(kind)), above, int(found[digit])
    raise AssertionError("a float has bits")


def histogram(tensors: Tensors, level: int, prefix: int) -> Counts:
    """How often each value of a digit occurs in |x|, among the entries whose digits before it are ``prefix``.

    Histograms of parts of the tensors add up to that of all.
    """
    found, width = torch.zeros(1 << _DIGIT, dtype=torch.int64), 4
    for _, tensor in tensors():
        for _, tile in tiles(tensor):
            size = tile.abs().contiguous().flatten()
            width = size.element_size()
            bits = size.view(torch.int64 if width == 8 else torch.int32)
            shift = 8 * width - _DIGIT * (level + 1)
            if level:
                bits = bits[(bits >> (shift + _DIGIT)) == prefix]
            found += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << _DIGIT)
    return found, width
