"""What an adapter can do to one tensor of the base, and the tiles of all that is more than a product s·B·A.

    LowRank   s·B·A, transposed where the base stores [in, out]; with a magnitude, DoRA
    Stack     one such product per expert of a stacked parameter
    Shift     a bias: Δb = s·bias of lora_B
    Saved     the tensor is replaced                  Rows   some rows of it are replaced

The tiles have the `Tiled` protocol of `paft.delta`, are float32, and have the same bits however they are cut: sums of
squares are taken by `tree_sum`, whose order of additions is fixed by the shape alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from paft.checkpoint import Checkpoint
from paft.errors import MismatchError
from paft.factors import Factors, Rows, Saved

_STRIP = 64


@dataclass(frozen=True)
class LowRank:
    factors: Factors
    transposed: bool


@dataclass(frozen=True)
class Stack:
    experts: tuple[LowRank, ...]


@dataclass(frozen=True)
class Shift:
    change: torch.Tensor


Part = LowRank | Stack | Shift | Saved | Rows


class Tiles(Protocol):
    """What can be read by rows: the part of `paft.delta.Tiled` that is needed here."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def tile(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class DoraTensor:
    """DoRA: ``ΔW = m·(W + P)/‖W + P‖ - W`` for P = s·B·A, the norm over each output's weights.

    It is computed as ``(f - 1)·W + f·P`` with f = m/‖W + P‖ in float64, which loses no digits where W' is near W;
    PEFT subtracts nothing but rounds W' to float32. ``factor`` is f of every column, where outputs are columns
    (Conv1D's [in, out], and the hidden units of an embedding); None where outputs are rows, whose norms are taken
    tile by tile from ``magnitude`` [rows].
    """

    name: str
    product: Tiles
    base: Checkpoint
    magnitude: torch.Tensor
    factor: torch.Tensor | None
    step: int
    key: str

    @property
    def rows(self) -> int:
        return self.product.rows

    @property
    def columns(self) -> int:
        return self.product.columns

    def tile(self, start: int, stop: int) -> torch.Tensor:
        weight, product = self.base.tile(self.name, start, stop).float(), self.product.tile(start, stop)
        factor = self.factor
        if factor is None:
            squares = tree_sum((weight.double() + product.double()).square_(), 1)
            factor = divide(self.name, self.magnitude[start:stop], squares).unsqueeze(1)
        return (factor - 1).float() * weight + factor.float() * product


def column_factors(name: str, product: Tiles, base: Checkpoint, magnitude: torch.Tensor) -> torch.Tensor:
    """DoRA's m/‖W + P‖ of every column, float64: one pass over the tensor, in strips of 64 rows."""
    squares = torch.zeros(product.columns, dtype=torch.float64)
    for start in range(0, product.rows, _STRIP):
        stop = min(start + _STRIP, product.rows)
        strip = base.tile(name, start, stop).double() + product.tile(start, stop).double()
        squares += tree_sum(strip.square_(), 0)
    return divide(name, magnitude, squares)


def divide(name: str, magnitude: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """m/√squares in float64; MismatchError where a norm is zero or not finite."""
    if not (torch.isfinite(squares).all() and (squares > 0).all()):
        raise MismatchError(f"DoRA divides by the norm of W + ΔW, which is zero or not finite for an output of {name}")
    return magnitude.double() / squares.sqrt()


def tree_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over ``dim`` by adding the second half to the first until one is left.

    Elementwise additions only, so no thread count, vector width or device changes a bit. Overwrites ``values``.
    """
    while (size := values.shape[dim]) > 1:
        half = size // 2
        low, high = values.narrow(dim, 0, half), values.narrow(dim, size - half, half)
        low += high
        values = values.narrow(dim, 0, size - half)
    return values.select(dim, 0)


@dataclass(frozen=True)
class RowsTensor:
    """Replaced rows: ``ΔW[i] = values[i] - W[i]`` for the rows given, zero elsewhere."""

    name: str
    given: Rows
    base: Checkpoint
    rows: int
    columns: int
    step: int
    key: str

    def tile(self, start: int, stop: int) -> torch.Tensor:
        out = torch.zeros(stop - start, self.columns)
        for row, value in zip(self.given.indices, self.given.values, strict=True):
            if start <= row < stop:
                out[row - start] = value - self.base.tile(self.name, row, row + 1)[0].float()
        return out


@dataclass(frozen=True)
class StackTensor:
    """Products of equal height on top of one another: a parameter [experts, rows, columns] read as a matrix."""

    experts: Sequence[Tiles]
    step: int
    key: str

    @property
    def rows(self) -> int:
        return len(self.experts) * self.experts[0].rows

    @property
    def columns(self) -> int:
        return self.experts[0].columns

    def tile(self, start: int, stop: int) -> torch.Tensor:
        height = self.experts[0].rows
        out = torch.empty(stop - start, self.columns)
        for index in range(start // height, -(-stop // height)):
            first, last = max(start, index * height), min(stop, (index + 1) * height)
            out[first - start : last - start] = self.experts[index].tile(first - index * height, last - index * height)
        return out


@dataclass(frozen=True)
class VectorTensor:
    """A change in memory that is one row: of a bias."""

    data: torch.Tensor
    step: int
    key: str
    rows: int = 1

    @property
    def columns(self) -> int:
        return len(self.data)

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return self.data.view(1, -1)[start:stop].clone()


@dataclass(frozen=True)
class SumTensor:
    """Two changes of one tensor: W is replaced, and s·B·A is added to its replacement."""

    parts: Sequence[Tiles]
    step: int
    key: str

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    def tile(self, start: int, stop: int) -> torch.Tensor:
        out = self.parts[0].tile(start, stop)
        for part in self.parts[1:]:
            out = out + part.tile(start, stop)
        return out
