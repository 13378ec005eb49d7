"""What merge methods are made of: trim, drop and rescale, weighted sums. The reference form, in plain torch.

A method looks at the deltas of one tensor in a first pass, tile by tile, and returns a `Plan`: one filter per delta
and a combination, both applied to tiles in the second pass. Every result is independent of the tile size, bit for
bit: sums are taken in float64 along rows and added exactly (`math.fsum`), and no fused multiply-add (`addcmul`,
`add(alpha=)`) is used, because torch rounds it differently at the end of a vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from paft.delta import BLOCK, ProductTensor, Tiled, ZeroTensor, spans
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
    one. ``l1``: DARE and DELLA restore the L1 norm, else they divide by the probability of being kept. ``whole``: TIES
    trims over the whole model, else tensor by tensor.
    """

    weighted: bool
    mean: bool
    majority: bool
    boundary: bool
    l1: bool
    whole: bool


DIALECTS = {
    "mergekit": Dialect(weighted=True, mean=False, majority=False, boundary=False, l1=True, whole=False),
    "paper": Dialect(weighted=False, mean=True, majority=True, boundary=True, l1=False, whole=True),
    "peft": Dialect(weighted=False, mean=True, majority=False, boundary=False, l1=False, whole=False),
}


def find_dialect(name: str) -> Dialect:
    """The rules of a dialect; raises UsageError for an unknown one."""
    if name not in DIALECTS:
        raise UsageError(f"there is no dialect {name!r}", hint=did_you_mean(name, DIALECTS))
    return DIALECTS[name]


# Numbers per adapter


def numbers(name: str, value: PerAdapter, count: int) -> list[float]:
    """One number per adapter out of a number or a list; raises UsageError for a list of another length."""
    values: list[float] = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise UsageError(f"{name} has {len(values)} values for {count} adapters", hint="give one number, or one for each adapter")
    return values


def densities(value: PerAdapter, count: int) -> list[float]:
    """One density per adapter; raises UsageError outside (0, 1] or for a wrong length."""
    values = numbers("density", value, count)
    for each in values:
        if not 0 < each <= 1:
            raise UsageError(f"density must be in (0, 1], not {each}", hint="density is the share of entries that is kept")
    return values


def no_weights(name: str, weights: Sequence[float]) -> None:
    """Refuse weights for a method that weighs the adapters itself, as mergekit's has no such parameter."""
    if any(weight != 1 for weight in weights):
        raise UsageError(f"{name} takes no weights: it weighs the adapters itself", hint="leave the weights out")


def divisor(weights: Sequence[float], normalize: bool) -> float:
    """Σ w when normalising, else 1; a sum of zero (below 1e-8) divides by 1, as in mergekit."""
    total = math.fsum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


# Passes over a tensor


def tiles(delta: Tiled) -> Iterator[tuple[int, torch.Tensor]]:
    """The tiles of a delta with their first rows, in order."""
    for start, stop in spans(delta):
        yield start, delta.tile(start, stop)


def row_sums(value: torch.Tensor) -> torch.Tensor:
    """The sum of each row in float64, whatever the number of rows and threads."""
    # Torch shares out a lone long row among threads, which moves its rounding; two rows it does not.
    return (torch.cat([value, value]) if len(value) == 1 else value).sum(dim=1, dtype=torch.float64)[: len(value)]


def total(delta: Tiled, value: Callable[[torch.Tensor, int], torch.Tensor]) -> float:
    """Σ over all entries of ``value(tile, first row)``: float64 along a row, exact over rows, whatever the tiles."""
    rows: list[float] = []
    for start, tile in tiles(delta):
        rows += row_sums(value(tile, start)).tolist()
    return math.fsum(rows)


def totals(deltas: Sequence[Tiled], values: Callable[[list[torch.Tensor], int], Sequence[torch.Tensor]]) -> list[float]:
    """`total` of several quantities that need the tiles of all deltas, in one pass."""
    rows: list[list[float]] = []
    for start, stop in spans(deltas[0]):
        found = values([delta.tile(start, stop) for delta in deltas], start)
        rows = rows or [[] for _ in found]
        for sums, value in zip(rows, found, strict=True):
            sums += row_sums(value).tolist()
    return [math.fsum(sums) for sums in rows]


def dot(left: Tiled, right: Tiled) -> float:
    """⟨left, right⟩ over all entries, in float64: from the factors where both are products, else in one pass."""
    return gram([left, right], pairs=[(0, 1)])[0][1]


def gram(deltas: Sequence[Tiled], pairs: Sequence[tuple[int, int]] | None = None) -> list[list[float]]:
    """All inner products ``G[i][j] = ⟨δ_i, δ_j⟩`` in float64 (or those of ``pairs``, 0 elsewhere).

    Two LoRAs need no dense pass, as ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ) over matrices of r₁ × r₂. This is the product
    of the factors themselves; a tile of float32 differs from it by its rounding. All others share one pass.
    """
    count = len(deltas)
    found: dict[tuple[int, int], float] = {}
    dense: list[tuple[int, int]] = []
    for i, j in pairs or list(itertools.combinations_with_replacement(range(count), 2)):
        left, right = deltas[i], deltas[j]
        if isinstance(left, ProductTensor) and isinstance(right, ProductTensor):
            found[i, j] = _product_dot(left, right)
        elif isinstance(left, ZeroTensor) or isinstance(right, ZeroTensor):
            found[i, j] = 0.0
        else:
            dense.append((i, j))
    if dense:

        def products(tiles: list[torch.Tensor], start: int) -> list[torch.Tensor]:
            wide = [tile.double() for tile in tiles]
            return [wide[i] * wide[j] for i, j in dense]

        found |= zip(dense, totals(deltas, products), strict=True)
    return [[found.get((i, j), found.get((j, i), 0.0)) for j in range(count)] for i in range(count)]


def _product_dot(left: ProductTensor, right: ProductTensor) -> float:
    columns = _blocked(left.right.T, right.right.T)
    return math.fsum((_blocked(left.left, right.left) * columns).flatten().tolist())


def _blocked(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``leftᵀ @ right`` in float64, in fixed blocks of rows added in order: no library splits these among threads."""
    out = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for row in range(0, left.shape[0], 4 * BLOCK):
        out += left[row : row + 4 * BLOCK].double().T @ right[row : row + 4 * BLOCK].double()
    return out


# Filters


def keep(tile: torch.Tensor, start: int) -> torch.Tensor:
    """The filter that changes nothing."""
    return tile


def flat_index(tile: torch.Tensor, start: int) -> torch.Tensor:
    """Each entry's index in the flattened tensor, int64, in the tile's shape."""
    first = start * tile.shape[1]
    return torch.arange(first, first + tile.numel()).view(tile.shape)


# Combining


def weighted_sum(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w_i x_i, added in the order given."""
    out = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out += part if weight == 1 else part * weight
    return out


@dataclass(frozen=True)
class WeightedSum:
    """The combination ``D = Σ c_i x_i``."""

    coefficients: tuple[float, ...]

    def __call__(self, parts: list[torch.Tensor], start: int) -> torch.Tensor:
        return weighted_sum(parts, self.coefficients)


def combine_linearly(coefficients: Sequence[float]) -> Plan:
    """The plan of ``D = Σ c_i δ_i``, which is linear in the deltas."""
    return Plan([keep] * len(coefficients), WeightedSum(tuple(coefficients)), coefficients)


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
