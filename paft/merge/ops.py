"""What merge methods are made of: trim, drop and rescale, weighted sums. The reference form, in plain torch.

A method looks at the deltas of one tensor in a first pass, tile by tile, and returns a `Plan`: one filter per delta
and a combination, both applied to tiles in the second pass. Every result is independent of the tile size, bit for
bit: sums are taken in float64 along rows and added exactly (`math.fsum`), and no fused multiply-add (`addcmul`,
`add(alpha=)`) is used, because torch rounds it differently at the end of a vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from paft.delta import Tiled, spans
from paft.errors import UsageError, did_you_mean

PerAdapter = float | list[float]
Filter = Callable[[torch.Tensor, int], torch.Tensor]
Combine = Callable[[list[torch.Tensor], int], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How one tensor is merged. ``filters[i]`` takes (tile of delta i, first row); ``combine`` takes the filtered
    tiles.

    ``coefficients`` is set when the merged delta is ``Σ c_i ΔW_i``: then it is a LoRA, exactly.
    """

    filters: Sequence[Filter]
    combine: Combine
    coefficients: Sequence[float] | None = None

    def __call__(self, tiles: Sequence[torch.Tensor], start: int) -> torch.Tensor:
        return self.combine([f(tile, start) for f, tile in zip(self.filters, tiles, strict=True)], start)


@dataclass(frozen=True)
class Dialect:
    """Where the implementations of TIES and DARE differ.

    ``weighted``: weights apply before the vote and in the mean's divisor, else after the vote and the divisor is a
    count. ``mean``: the default of DARE-TIES's ``normalize``. ``majority``: an undecided vote takes the tensor's
    majority sign, else +. ``boundary``: trimming keeps ``int(density·n) + 1`` and all magnitudes equal to the last
    one. ``l1``: DARE restores the L1 norm, else it divides by the density.
    """

    weighted: bool
    mean: bool
    majority: bool
    boundary: bool
    l1: bool


DIALECTS = {
    "mergekit": Dialect(weighted=True, mean=False, majority=False, boundary=False, l1=True),
    "paper": Dialect(weighted=False, mean=True, majority=True, boundary=True, l1=False),
    "peft": Dialect(weighted=False, mean=True, majority=False, boundary=False, l1=False),
}


def find_dialect(name: str) -> Dialect:
    """The rules of a dialect; raises UsageError for an unknown one."""
    if name not in DIALECTS:
        raise UsageError(f"there is no dialect {name!r}", hint=did_you_mean(name, DIALECTS))
    return DIALECTS[name]


# Numbers per adapter


def densities(value: PerAdapter, count: int) -> list[float]:
    """One density per adapter out of a number or a list; raises UsageError outside (0, 1] or for a wrong length."""
    values: list[float] = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise UsageError(
            f"density has {len(values)} values for {count} adapters", hint="give one number, or one for each adapter"
        )
    for each in values:
        if not 0 < each <= 1:
            raise UsageError(f"density must be in (0, 1], not {each}", hint="density is the share of entries that is kept")
    return values


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """Σ w when normalising, else 1; a sum of zero (below 1e-8) divides by 1, as in mergekit."""
    total = math.fsum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


# Passes over a tensor


def tiles(delta: Tiled) -> Iterator[tuple[int, torch.Tensor]]:
    """The tiles of a delta with their first rows, in order."""
    for start, stop in spans(delta):
        yield start, delta.tile(start, stop)


def total(delta: Tiled, value: Callable[[torch.Tensor, int], torch.Tensor]) -> float:
    """Σ over all entries of ``value(tile, first row)``: float64 along a row, exact over rows, whatever the tiles."""
    rows: list[float] = []
    for start, tile in tiles(delta):
        rows += value(tile, start).sum(dim=1, dtype=torch.float64).tolist()
    return math.fsum(rows)


def dot(left: Tiled, right: Tiled) -> float:
    """⟨left, right⟩ over all entries, in float64."""
    return total(left, lambda tile, start: tile.double() * right.tile(start, start + len(tile)).double())


# Trimming by magnitude


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


def keep(tile: torch.Tensor, start: int) -> torch.Tensor:
    """The filter that changes nothing."""
    return tile


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


def flat_index(tile: torch.Tensor, start: int) -> torch.Tensor:
    """Each entry's index in the flattened tensor, int64, in the tile's shape."""
    first = start * tile.shape[1]
    return torch.arange(first, first + tile.numel()).view(tile.shape)


# Dropping at random


@dataclass(frozen=True)
class Drop:
    """Keep each entry with probability ``density``, times ``scale``. Entry i is kept when hash(key + i·φ) <
    density·2³².

    The hash is SplitMix64's finaliser (Steele et al. 2014): a counter-based generator, so that the mask of an entry
    depends on its key and index alone.
    """

    key: int
    density: float
    scale: float = 1.0

    def mask(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        bits = flat_index(tile, start).mul_(_GOLDEN).add_(self.key)
        bits ^= (bits >> 30) & ((1 << 34) - 1)  # int64 shifts copy the sign; the mask makes them logical
        bits *= _MIX1
        bits ^= (bits >> 27) & ((1 << 37) - 1)
        bits *= _MIX2
        bits ^= (bits >> 31) & ((1 << 33) - 1)
        return ((bits >> 32) & 0xFFFFFFFF) < round(self.density * (1 << 32))

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        return tile * self.scale * self.mask(tile, start)


_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def drop(delta: Tiled, density: float, seed: int, rescale: bool, dialect: Dialect) -> Filter:
    """DARE's filter: drop entries at random, then restore the size by 1/density, or to the same L1 norm (mergekit)."""
    if density >= 1:
        return keep
    digest = hashlib.sha256(f"{seed}\0{delta.key}".encode()).digest()
    plain = Drop(int.from_bytes(digest[:8], "little", signed=True), density)
    if not rescale:
        return plain
    if not dialect.l1:
        return Drop(plain.key, density, 1 / density)
    before = total(delta, lambda tile, start: tile.abs())
    after = total(delta, lambda tile, start: tile.abs() * plain.mask(tile, start))
    return Drop(plain.key, density, before / after if after else 1.0)


# Combining


def weighted_sum(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w_i x_i, added in the order given."""
    out = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out += part if weight == 1 else part * weight
    return out


# Plain tensors, for tests and notebooks


@dataclass(frozen=True)
class DenseTensor:
    """A tensor in memory as a `Tiled`."""

    data: torch.Tensor
    key: str = ""
    step: int = 1 << 30
    rows: int = field(init=False)
    columns: int = field(init=False)

    def __post_init__(self) -> None:
        columns = self.data.shape[-1] if self.data.dim() else 1
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", self.data.numel() // max(1, columns))

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return self.data.reshape(self.rows, self.columns)[start:stop]


def apply(
    method: Callable[..., Plan],
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    step: int = 1 << 30,
    **parameters: object,
) -> torch.Tensor:
    """Merge plain tensors: ``apply(ties, [d1, d2], [1, 1], density=0.5)``, in tiles of ``step`` rows.

    The masks of DARE are keyed by each delta's place in the list.
    """
    tensors = [DenseTensor(delta, str(place), step) for place, delta in enumerate(deltas)]
    plan = method(tensors, weights, **parameters)
    parts = [plan([t.tile(a, b) for t in tensors], a) for a, b in spans(tensors[0])]
    return torch.cat(parts).reshape(deltas[0].shape)
