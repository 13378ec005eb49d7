"""The exact k-th largest magnitude of a tensor that is never held whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from paft.delta import ProductTensor, Tiled, fill, spans
from paft.merge.ops import tiles

FUSED_FROM = 1 << 17  # entries; below this the plain form is done before numba is loaded
_SAMPLE = (1 << 14, 1 << 17)  # least and most entries that are looked at to guess the answer
_SLACK = 1.6  # over √m, to each side, as a share of all ranks: 3.2 standard errors of the median of m; a miss costs two passes


@dataclass(frozen=True)
class Selection:
    """``value``: the k-th largest |x|; ``above``: how many are larger; ``places``: flat indices of those equal to it."""

    value: float
    above: int
    places: torch.Tensor


def select(delta: Tiled, count: int) -> Selection:
    """The ``count``-th largest magnitude, exactly. Both forms give the same answer."""
    size = delta.rows * delta.columns
    first = delta.tile(0, min(1, delta.rows))
    if size >= FUSED_FROM and (first.dtype, first.device.type) == (torch.float32, "cpu"):
        return between(delta, count) or by_histogram(delta, count)
    return by_histogram(delta, count)


def by_histogram(delta: Tiled, count: int) -> Selection:
    """Two passes: a histogram of the top 16 bits of |x| (ordered as |x| is), then the entries of the one bin that holds
    the value. A bin is at most 1/128 of its value wide in float32, so it holds a small share of the entries.
    """
    histogram = torch.zeros(1 << 15, dtype=torch.int64)
    for _, tile in tiles(delta):
        histogram += torch.bincount(_top_bits(tile), minlength=1 << 15)
    reached = histogram.flip(0).cumsum(0)
    from_top = int(torch.searchsorted(reached, torch.tensor(count)))
    chosen = (1 << 15) - 1 - from_top
    above = int(reached[from_top] - histogram[chosen])
    inside, places = [], []
    for start, tile in tiles(delta):
        where = (_top_bits(tile) == chosen).nonzero().flatten()
        inside.append(tile.flatten().abs()[where])
        places.append(where + start * delta.columns)
    return _among(torch.cat(inside), torch.cat(places), above, count)


def _top_bits(tile: torch.Tensor) -> torch.Tensor:
    wide = tile.dtype == torch.float64
    bits = tile.contiguous().flatten().view(torch.int64 if wide else torch.int32)
    return (bits >> (48 if wide else 16)) & 0x7FFF


def _among(sizes: torch.Tensor, places: torch.Tensor, above: int, count: int) -> Selection:
    """The answer from the candidates (in index order) and the number of entries above them all."""
    value = sizes.kthvalue(len(sizes) - (count - above) + 1).values
    return Selection(float(value), above + int((sizes > value).sum()), places[sizes == value])


def _sample(delta: Tiled, stride: int) -> torch.Tensor:
    """One entry in ``stride``. Of a product every row and every column is seen equally often, as their sizes differ."""
    if not isinstance(delta, ProductTensor):
        return torch.cat([delta.tile(row, row + 1).flatten() for row in range(0, delta.rows, stride)])
    parts = [delta.left[i::stride] @ delta.right[:, i::stride] for i in range(min(stride, delta.rows, delta.columns))]
    return torch.cat([part.flatten() for part in parts])


def between(delta: Tiled, count: int) -> Selection | None:
    """One pass: a sample says between which magnitudes the answer lies; the pass counts what is larger and collects
    what lies between. None when the sample misled.
    """
    from paft.merge.collect import collect

    size = delta.rows * delta.columns
    sample = _sample(delta, size // min(max(size // 32, _SAMPLE[0]), _SAMPLE[1])).abs_().numpy()
    slack = _SLACK / len(sample) ** 0.5
    low, high = _quantiles(sample, 1 - count / size - slack, 1 - count / size + slack)
    sizes = np.empty(int(size * 3 * slack) + 4096 + delta.columns, np.uint32)
    places = np.empty(len(sizes), np.int64)
    above = filled = 0
    buffer = torch.empty(min(delta.step, delta.rows), delta.columns)
    for start, stop in spans(delta):
        tile = fill(buffer[: stop - start], delta, start, stop).numpy().view(np.uint32)
        more, filled = collect(tile, low, high, start * delta.columns, sizes, places, filled)
        above += more
        if filled > len(sizes):
            return None
    if not above < count <= above + filled:
        return None
    return _among(torch.from_numpy(sizes[:filled].view(np.float32)), torch.from_numpy(places[:filled]), above, count)


def _quantiles(sample: np.ndarray, low: float, high: float) -> np.ndarray:
    """Two quantiles of a sample (which is reordered) as bits, open where they lie outside it."""
    ends = [int(min(max(share, 0), 1) * (len(sample) - 1)) for share in (low, high)]
    sample.partition(ends)
    return np.array([sample[ends[0]] if low > 0 else 0, sample[ends[1]] if high < 1 else np.inf], np.float32).view(np.uint32)
