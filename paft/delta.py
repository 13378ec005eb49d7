"""One adapter or fine-tuned model as a lazy set of ΔW over the base's tensor names, read by row tiles in float32.

    LoraDelta   ΔW = s·B·A           from the factors (transposed where the base stores [in, out])
    FullDelta   ΔW = θ_ft - θ_pre    from two checkpoints

Tiles have the same bits whatever their size: a product is computed in fixed blocks of `BLOCK` rows, because a matrix
library may round a row differently in a product of another height.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from paft.adapter import Adapter, Factors
from paft.checkpoint import Checkpoint, Entry
from paft.errors import MismatchError

BLOCK = 64
TILE_ELEMENTS = 1 << 18  # 1 MB of float32: a few tiles fit into the second-level cache
# Model types of transformers whose linear layers are Conv1D and store W as [in, out].
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
HEADS = ("lm_head", "embed_out")


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
    """The ΔW of a LoRA adapter over a base.

    Each module ``m`` is the tensor ``m.weight``, found by its full name, or by the one base tensor whose name is that
    without (or with) a prefix, as GPT-2's ``h.0`` for ``transformer.h.0``. Raises MismatchError, with the tensor's
    name, when the base has no such tensor, when shapes disagree, when two modules meet in one tensor, or when the
    target is a tied head (its change would leak into the embedding).
    """

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self.adapter = adapter
        self.content_hash = adapter.content_hash
        self.modules: dict[str, str] = {}
        self._transposed: dict[str, bool] = {}
        for module, factors in adapter.factors.items():
            name = self._find(module, base)
            if name in self.modules:
                raise MismatchError(f"{adapter.name}: {module} and {self.modules[name]} are both {name} of the base")
            self.modules[name] = module
            self._transposed[name] = self._check(module, factors, base.entries[name], base.config)
        for module, copy in adapter.copies.items():
            self._check_copy(module, copy, base)

    @property
    def names(self) -> list[str]:
        return list(self.modules)

    def shape(self, name: str) -> tuple[int, int]:
        factors = self.adapter.factors[self.modules[name]]
        rows, columns = factors.B.shape[0], factors.A.shape[1]
        return (columns, rows) if self._transposed[name] else (rows, columns)

    def tensor(self, name: str, elements: int = TILE_ELEMENTS) -> ProductTensor:
        factors = self.adapter.factors[self.modules[name]]
        left, right = factors.B * factors.scale, factors.A
        if self._transposed[name]:
            left, right = right.T.contiguous(), left.T.contiguous()
        return ProductTensor(left, right, tile_rows(right.shape[1], elements), f"{self.content_hash}\0{name}")

    def tile(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensor(name).tile(start, stop)

    def _find(self, module: str, base: Checkpoint) -> str:
        name = f"{module}.weight"
        if module.rpartition(".")[2] in HEADS and _is_tied(base, name):
            raise MismatchError(
                f"{self.adapter.name}: {module} is tied to the embedding of the base",
                hint="train without the head, or untie it (tie_word_embeddings=false) first",
            )
        if name in base.entries:
            return name
        near = [other for other in base.entries if other.endswith("." + name) or name.endswith("." + other)]
        if len(near) != 1:
            raise MismatchError(
                f"{self.adapter.name}: the base has no tensor {name}",
                hint=f"the adapter was trained on {self.adapter.base_model or 'another model'}",
            )
        return near[0]

    def _check_copy(self, module: str, copy: torch.Tensor, base: Checkpoint) -> None:
        """A weight stored beside the factors must be the base's own (in the copy's type), as it would replace it."""
        entry = base.entries[self._find(module, base)]
        if entry.shape == copy.shape and entry.is_float:
            own = base.tile(entry.name, 0, entry.rows).view(entry.shape)
            if torch.equal(own.to(copy.dtype), copy):
                return
        raise MismatchError(f"{self.adapter.name} replaces the whole {entry.name} of the base, which is not supported yet")

    def _check(self, module: str, factors: Factors, entry: Entry, config: dict[str, Any]) -> bool:
        """Is the tensor stored as [in, out]? The base decides, as PEFT corrects the flag by the layer's class."""
        kind = config.get("model_type")
        conv1d = kind in CONV1D_MODELS and module.rpartition(".")[2] not in HEADS
        transposed = conv1d if kind else factors.fan_in_fan_out
        shape = (factors.B.shape[0], factors.A.shape[1])
        wanted = shape[::-1] if transposed else shape
        if not entry.is_float:
            raise MismatchError(f"the base's {entry.name} is quantised ({entry.dtype})", hint="merge into the float base")
        if entry.shape != wanted:
            raise MismatchError(
                f"{self.adapter.name}: ΔW of {entry.name} is {list(wanted)}, the base's is {list(entry.shape)}",
                hint=f"the adapter was trained on {self.adapter.base_model or 'another model'}",
            )
        return transposed


class FullDelta:
    """The ΔW of a fine-tuned model: ``θ_ft - θ_pre`` of every float tensor, in float32.

    Raises MismatchError when the two do not have the same tensors of the same shapes, or when an integer tensor
    differs.
    """

    def __init__(self, tuned: Checkpoint, base: Checkpoint, content_hash: str) -> None:
        self.tuned, self.base, self.content_hash = tuned, base, content_hash
        for name in sorted(tuned.entries.keys() ^ base.entries.keys()):
            lacking = base.path.name if name in tuned.entries else tuned.path.name
            raise MismatchError(f"{lacking} has no tensor {name}", hint="a full model must have the tensors of its base")
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


def _is_tied(base: Checkpoint, head: str) -> bool:
    """Does the loaded model share the head with the embedding? The configuration says so; else its class's default."""
    if head not in base.entries:
        return True
    if "tie_word_embeddings" in base.config:
        return bool(base.config["tie_word_embeddings"])
    from transformers import CONFIG_MAPPING

    kind = str(base.config.get("model_type"))
    return bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", True)) if kind in CONFIG_MAPPING else False
