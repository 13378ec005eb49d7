"""One adapter or fine-tuned model as a lazy set of ΔW over the base's tensor names, read by row tiles in float32.

    LoraDelta   ΔW = s·B·A           from the factors (transposed where the base stores [in, out]), and its variants
    FullDelta   ΔW = θ_ft - θ_pre    from two checkpoints

Tiles have the same bits whatever their size: a product is computed in fixed blocks of `BLOCK` rows, because a matrix
library may round a row differently in a product of another height.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from paft.adapter import Adapter
from paft.checkpoint import Checkpoint
from paft.errors import MismatchError
from paft.factors import Rows
from paft.naming import aligned
from paft.placement import place
from paft.variants import (
    DoraTensor,
    LowRank,
    Part,
    RowsTensor,
    Shift,
    Stack,
    StackTensor,
    SumTensor,
    VectorTensor,
    column_factors,
)

BLOCK = 64
TILE_ELEMENTS = 1 << 18  # 1 MB of float32: a few tiles fit into the second-level cache


class Tiled(Protocol):
    """One tensor's delta: a matrix [rows, columns] that is read by rows; ``key`` names it for random masks."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def key(self) -> str: ...

    def tile(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop``, ``[stop - start, columns]``, float32 (float64 in tests)."""
        ...


class Delta(Protocol):
    """All of one adapter's or model's ΔW, by the base's tensor names."""

    @property
    def content_hash(self) -> str: ...

    @property
    def names(self) -> list[str]: ...

    def tensor(self, name: str, elements: int = TILE_ELEMENTS) -> Tiled: ...


def tile_rows(columns: int, elements: int) -> int:
    """Rows per tile: about ``elements`` entries, in whole blocks (up to four times ``elements``), as a part costs as much."""
    rows = max(1, elements // max(1, columns))
    return rows // BLOCK * BLOCK or (BLOCK if 4 * rows >= BLOCK else rows)


def spans(tensor: Tiled) -> Iterator[tuple[int, int]]:
    """The row ranges of a tensor's tiles, in order."""
    for start in range(0, tensor.rows, tensor.step):
        yield start, min(start + tensor.step, tensor.rows)


@dataclass(frozen=True)
class ProductTensor:
    """``left @ right`` by rows; ``left`` [rows, r] carries the scale, ``right`` is [r, columns]."""

    left: torch.Tensor
    right: torch.Tensor
    step: int
    key: str

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    @property
    def columns(self) -> int:
        return self.right.shape[1]

    def tile(self, start: int, stop: int) -> torch.Tensor:
        first = start // BLOCK * BLOCK
        last = min(-(-stop // BLOCK) * BLOCK, self.rows)
        out = torch.empty(last - first, self.columns, dtype=self.right.dtype, device=self.right.device)
        self.into(out, first, last)
        return out[start - first : stop - first]

    def into(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Write the rows into ``out``; ``start`` is a multiple of `BLOCK`, and so is ``stop`` unless it is the last row."""
        for row in range(start, stop, BLOCK):
            end = min(row + BLOCK, stop)
            torch.mm(self.left[row:end], self.right, out=out[row - start : end - start])


def fill(place: torch.Tensor, tensor: Tiled, start: int, stop: int) -> torch.Tensor:
    """Rows ``start:stop`` of a tensor in ``place``; a product is computed there, which saves a copy."""
    if isinstance(tensor, ProductTensor) and start % BLOCK == 0 and (stop % BLOCK == 0 or stop == tensor.rows):
        tensor.into(place, start, stop)
        return place
    return place.copy_(tensor.tile(start, stop))


@dataclass(frozen=True)
class DifferenceTensor:
    """``θ_ft - θ_pre`` by rows, in float32."""

    name: str
    tuned: Checkpoint
    base: Checkpoint
    rows: int
    columns: int
    step: int
    key: str

    def tile(self, start: int, stop: int) -> torch.Tensor:
        tile = self.tuned.tile(self.name, start, stop).float() - self.base.tile(self.name, start, stop).float()
        if not torch.isfinite(tile).all():
            raise MismatchError(f"{self.tuned.path.name}: tensor {self.name} minus the base's holds NaN or infinity")
        return tile


@dataclass(frozen=True)
class ZeroTensor:
    """No change: what an adapter does to a tensor that it does not touch."""

    rows: int
    columns: int
    step: int
    key: str = ""

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start, self.columns)


@dataclass(frozen=True)
class BaseTensor:
    """The base's own tensor, widened to float32, for methods that look at W itself."""

    name: str
    base: Checkpoint
    rows: int
    columns: int
    step: int
    key: str = ""

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return self.base.tile(self.name, start, stop).float()


class LoraDelta:
    """The ΔW of an adapter over a base: LoRA in all its variants, replaced tensors, biases, rows and experts.

    Raises MismatchError, with the tensor's name, when something in the adapter has no exact place in the base
    (`paft.placement`). ``adapter`` is without saved copies of the base's own tensors; ``modules`` names the module of
    each tensor whose change is one plain s·B·A.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        placement = place(adapter, base)
        self.adapter, self.base, self.content_hash = placement.adapter, base, adapter.content_hash
        self.parts, self.modules, self._twins = placement.parts, placement.modules, placement.twins
        self._factors: dict[str, torch.Tensor] = {}  # of DoRA by columns, which take a pass over the tensor

    @property
    def names(self) -> list[str]:
        return list(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.entries[name].shape

    def tensor(self, name: str, elements: int = TILE_ELEMENTS) -> Tiled:
        step = tile_rows(self.base.entries[name].columns, elements)
        key = f"{self.content_hash}\0{self._twins.get(name, name)}"
        tensors = [self._tensor(part, name, step, key) for part in self.parts[name]]
        return tensors[0] if len(tensors) == 1 else SumTensor(tensors, step, key)

    def tile(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensor(name).tile(start, stop)

    def _tensor(self, part: Part, name: str, step: int, key: str) -> Tiled:
        entry = self.base.entries[name]
        if isinstance(part, LowRank):
            product, magnitude = _product(part, step, key), part.factors.magnitude
            return product if magnitude is None else self._dora(product, magnitude, part, name)
        if isinstance(part, Stack):
            return StackTensor([_product(each, step, key) for each in part.experts], step, key)
        if isinstance(part, Shift):
            return VectorTensor(part.change, step, key)
        if isinstance(part, Rows):
            return RowsTensor(name, part, self.base, entry.rows, entry.columns, step, key)
        saved = Checkpoint(self.adapter.path, (part.entry.file,), {name: part.entry}, {})
        return DifferenceTensor(name, saved, self.base, entry.rows, entry.columns, step, key)

    def _dora(self, product: ProductTensor, magnitude: torch.Tensor, part: LowRank, name: str) -> DoraTensor:
        if not (part.transposed or part.factors.embedding):
            return DoraTensor(name, product, self.base, magnitude, None, product.step, product.key)
        if name not in self._factors:
            self._factors[name] = column_factors(name, product, self.base, magnitude)
        return DoraTensor(name, product, self.base, magnitude, self._factors[name], product.step, product.key)


def _product(part: LowRank, step: int, key: str) -> ProductTensor:
    left, right = part.factors.B * part.factors.scale, part.factors.A
    if part.transposed:
        left, right = right.T.contiguous(), left.T.contiguous()
    return ProductTensor(left, right, step, key)


class FullDelta:
    """The ΔW of a fine-tuned model: ``θ_ft - θ_pre`` of every float tensor, in float32, by the base's names.

    Raises MismatchError when the two do not have the same tensors of the same shapes, or when an integer tensor
    differs.
    """

    def __init__(self, tuned: Checkpoint, base: Checkpoint, content_hash: str) -> None:
        tuned = aligned(tuned, base)
        self.tuned, self.base, self.content_hash = tuned, base, content_hash
        for name, entry in base.entries.items():
            other = tuned.entries[name]
            if other.shape != entry.shape or other.is_float != entry.is_float:
                raise MismatchError(
                    f"{tuned.path.name}: {name} is {other.dtype} {list(other.shape)}, "
                    f"the base's is {entry.dtype} {list(entry.shape)}"
                )
            if not entry.is_float and tuned.raw(name) != base.raw(name):
                raise MismatchError(f"{tuned.path.name}: {name} ({entry.dtype}) differs from the base's and cannot be merged")

    @property
    def names(self) -> list[str]:
        return [name for name, entry in self.base.entries.items() if entry.is_float]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.entries[name].shape

    def tensor(self, name: str, elements: int = TILE_ELEMENTS) -> DifferenceTensor:
        entry = self.base.entries[name]
        step = tile_rows(entry.columns, elements)
        return DifferenceTensor(name, self.tuned, self.base, entry.rows, entry.columns, step, f"{self.content_hash}\0{name}")

    def tile(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensor(name).tile(start, stop)

