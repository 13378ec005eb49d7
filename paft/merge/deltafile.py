"""Delta files: any ΔW on disk, each tensor in the smallest exact form, read back by row tiles.

A directory with ``delta.safetensors`` (sharded above 5 GB) and `paft_delta.json`, which names the base and says for each
tensor, by the base's name, how it is stored:

    dense     NAME                                  [shape]; float32, bfloat16 or float16, as all values
    csr       NAME#rows, NAME#values, NAME#columns  where row i's values begin [rows + 1], the values, their columns
    bitmask   NAME#rows, NAME#values, NAME#mask     the same with one bit per entry, [rows, ceil(columns / 8)]
    low_rank  NAME#left, NAME#right                 factors side by side, with their ranks and the sum that they form

Values are exact. A reader touches only the rows it is asked for. Nobody else's format: mergekit and PEFT have no files
for deltas.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paft.checkpoint import INDEX as MODEL_INDEX
from paft.checkpoint import Checkpoint, Entry, indexed_files, read_entries, read_into
from paft.delta import TILE_ELEMENTS, ProductTensor, Tiled, ZeroTensor, tile_rows
from paft.errors import MismatchError, NotFoundError
from paft.jsonfile import read_json
from paft.merge.merged import Merged, Term
from paft.merge.ops import combine_linearly
from paft.merge.tensorfile import DTYPES
from paft.provenance import content_hash
from paft.store import WeightFile, weight_file

CONFIG = "paft_delta.json"
SINGLE = "delta.safetensors"
INDEX = MODEL_INDEX.replace("model", "delta")
PATTERNS = [CONFIG, "delta*.safetensors", INDEX]
SCHEMA = 1
ARRAYS = {
    "dense": ("",),
    "csr": ("#rows", "#values", "#columns"),
    "bitmask": ("#rows", "#values", "#mask"),
    "low_rank": ("#left", "#right"),
}
_AGAIN = "copy or download it again"


def is_delta(directory: Path) -> bool:
    """Does a directory hold a delta file?"""
    return (directory / CONFIG).is_file()


def base_of(directory: Path) -> str | None:
    """The base that a delta file names, as its maker named it."""
    base = read_json(directory / CONFIG).get("base")
    name = base.get("name") if isinstance(base, dict) else None
    return name if isinstance(name, str) else None


def sample_hash(base: Checkpoint, name: str) -> str:
    """sha256 of up to 8 rows of a base's tensor, 4096 entries each, as float32: tells one base from another for little.

    A copy of the base in a wider type has the same hash. A base that differs only between the samples has it too.
    """
    entry = base.entries[name]
    digest = hashlib.sha256(str(list(entry.shape)).encode())
    for row in sorted({round(place * (entry.rows - 1) / 7) for place in range(8)} if entry.rows else ()):
        digest.update(base.tile(name, row, row + 1)[:, :4096].float().numpy().tobytes())
    return digest.hexdigest()


class DeltaFile:
    """A delta file over its base, as a `paft.delta.Delta`.

    Raises NotFoundError for missing files, MismatchError for damaged ones, for arrays that are missing, left over or
    of the wrong size, and, by the tensor's name, where the base has no such tensor, another shape or other values.
    """

    def __init__(self, path: Path, base: Checkpoint) -> None:
        self.path = path
        config = read_json(path / CONFIG)
        if config.get("schema") != SCHEMA:
            raise MismatchError(f"{path / CONFIG} has schema {config.get('schema')!r}; this paft reads {SCHEMA}")
        self.tensors: dict[str, dict[str, Any]] = config.get("tensors") or {}
        if not isinstance(self.tensors, dict) or not self.tensors:
            raise MismatchError(f"{path.name} is empty: it holds no delta")
        self.arrays: dict[str, Entry] = {}
        for entry in (entry for file in _files(path) for entry in read_entries(file)):
            if entry.name in self.arrays:
                raise MismatchError(f"{path} holds the array {entry.name} twice", hint=_AGAIN)
            self.arrays[entry.name] = entry
        used = {name + part for name, about in self.tensors.items() for part in self._check(name, about, base)}
        for name in sorted(self.arrays.keys() - used):
            raise MismatchError(f"{path.name}: array {name} belongs to no tensor of {CONFIG}", hint=_AGAIN)
        self.content_hash = content_hash(path)

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])

    def tensor(self, name: str, elements: int = TILE_ELEMENTS) -> Tiled:
        about = self.tensors[name]
        rows, columns = _matrix(about["shape"])
        step, key = tile_rows(columns, elements), f"{self.content_hash}\0{name}"
        if about["format"] == "low_rank":
            return self._product(name, rows, columns, step, key)
        if about["format"] == "dense":
            return DenseArray(self, name, rows, columns, step, key)
        pointers = self.read(name + "#rows", 0, rows + 1)
        counts = pointers.diff()
        whole = int(pointers[0]) == 0 and int(pointers[-1]) == self.arrays[name + "#values"].shape[0]
        if not whole or bool((counts < 0).any()) or bool((counts > columns).any()):
            raise MismatchError(f"{self.path.name}: {name}#rows does not count its values", hint=_AGAIN)
        return SparseArray(self, name, rows, columns, step, key, pointers, about["format"] == "bitmask")

    def tile(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensor(name).tile(start, stop)

    def read(self, array: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop`` of a stored array, flat, in the stored type; floats are checked for NaN."""
        entry = self.arrays[array]
        dtype = DTYPES[entry.dtype]
        if start == stop:
            return torch.empty(0, dtype=dtype)
        buffer = bytearray((stop - start) * dtype.itemsize)
        read_into(entry, memoryview(buffer), start * dtype.itemsize)
        values = torch.frombuffer(buffer, dtype=dtype)
        if dtype.is_floating_point and not torch.isfinite(values).all():
            raise MismatchError(f"{self.path.name}: {array} holds NaN or infinity", hint=_AGAIN)
        return values

    def _product(self, name: str, rows: int, columns: int, step: int, key: str) -> Tiled:
        about, total = self.tensors[name], self.arrays[name + "#right"].shape[0]
        left = self.read(name + "#left", 0, rows * total).view(rows, total).split(about["ranks"], dim=1)
        right = self.read(name + "#right", 0, total * columns).view(total, columns).split(about["ranks"])
        products = [ProductTensor(b.contiguous(), a.contiguous(), step, key) for b, a in zip(left, right, strict=True)]

        def build(term: Term) -> Tiled:
            if isinstance(term, int):
                return products[term]
            if not term:
                return ZeroTensor(rows, columns, step, key)
            return Merged([build(inner) for _, inner in term], combine_linearly([share for share, _ in term]), key)

        return build(about["terms"])

    def _check(self, name: str, about: Any, base: Checkpoint) -> tuple[str, ...]:
        """One tensor's record against the files and the base; returns the arrays that it uses."""
        if not _is_record(about):
            raise MismatchError(f"{self.path / CONFIG}: the record of {name} is malformed", hint=_AGAIN)
        entry = base.entries.get(name)
        if entry is None:
            raise MismatchError(f"{self.path.name}: the base has no tensor {name}", hint=self._made_on())
        if not entry.is_float:
            raise MismatchError(f"the base's {name} is quantised ({entry.dtype})", hint="merge into the float base")
        if list(entry.shape) != about["shape"]:
            raise MismatchError(
                f"{self.path.name}: ΔW of {name} is {about['shape']}, the base's is {list(entry.shape)}", hint=self._made_on()
            )
        parts, wanted = ARRAYS[about["format"]], _wanted(about, self.arrays.get(name + "#values"))
        for part in parts:
            found = self.arrays.get(name + part)
            if found is None or not _fits(found, wanted[part]):
                raise MismatchError(f"{self.path.name}: array {name + part} is missing or of the wrong size", hint=_AGAIN)
        if about.get("base_sample_sha256") != sample_hash(base, name):
            raise MismatchError(
                f"{self.path.name}: {name} of this base is not the tensor that the delta was made on", hint=self._made_on()
            )
        return parts

    def _made_on(self) -> str:
        return f"the delta was made on {base_of(self.path) or 'another model'}"


@dataclass(frozen=True)
class DenseArray:
    """A dense tensor of a delta file by rows, widened to float32."""

    file: DeltaFile
    name: str
    rows: int
    columns: int
    step: int
    key: str

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return self.file.read(self.name, start * self.columns, stop * self.columns).view(-1, self.columns).float()


@dataclass(frozen=True)
class SparseArray:
    """A sparse tensor of a delta file by rows: ``pointers[i]`` says where row i's values begin."""

    file: DeltaFile
    name: str
    rows: int
    columns: int
    step: int
    key: str
    pointers: torch.Tensor
    bitmask: bool

    def tile(self, start: int, stop: int) -> torch.Tensor:
        first, last = int(self.pointers[start]), int(self.pointers[stop])
        values = self.file.read(self.name + "#values", first, last).float()
        out = torch.zeros(stop - start, self.columns)
        counts = self.pointers[start : stop + 1].diff()
        if self.bitmask:
            chosen = self._mask(start, stop)
            whole = torch.equal(chosen.sum(dim=1), counts)
            where = None
        else:
            columns = self.file.read(self.name + "#columns", first, last).to(torch.int64)
            where = torch.repeat_interleave(torch.arange(stop - start), counts) * self.columns + columns
            whole = bool((columns < self.columns).all()) and bool((where.diff() > 0).all())
        if not whole:
            raise MismatchError(f"{self.file.path.name}: the places of {self.name} do not fit its rows", hint=_AGAIN)
        return out.masked_scatter_(chosen, values) if where is None else out.view(-1).index_put_((where,), values).view_as(out)

    def _mask(self, start: int, stop: int) -> torch.Tensor:
        width = -(-self.columns // 8)
        packed = self.file.read(self.name + "#mask", start * width, stop * width).view(-1, width).numpy()
        return torch.from_numpy(np.unpackbits(packed, axis=1, count=self.columns, bitorder="little").view(bool))


def _files(path: Path) -> list[WeightFile]:
    if not (path / INDEX).is_file():
        if single := weight_file(path / SINGLE):
            return [single]
        raise NotFoundError(f"{path} holds no {SINGLE}", hint=_AGAIN)
    return list(indexed_files(path / INDEX))


def _matrix(shape: list[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _fits(entry: Entry, wanted: tuple[str, tuple[int, ...]]) -> bool:
    """Has an array one of these types, this shape, and as many bytes?"""
    whole = entry.dtype in DTYPES and entry.nbytes == math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    return whole and entry.dtype in wanted[0].split() and entry.shape == wanted[1]


def _wanted(about: dict[str, Any], values: Entry | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The types and shape of every array that a tensor's record asks for; ``values`` says how many there are."""
    rows, columns = _matrix(about["shape"])
    count, total = math.prod(values.shape) if values is not None else -1, sum(about.get("ranks", ()))
    return {
        "": ("F32 BF16 F16", tuple(about["shape"])),
        "#rows": ("I64", (rows + 1,)),
        "#values": ("F32 BF16 F16", (count,)),
        "#columns": ("U16 U32", (count,)),
        "#mask": ("U8", (rows, -(-columns // 8))),
        "#left": ("F32", (rows, total)),
        "#right": ("F32", (total, columns)),
    }


def _is_record(about: Any) -> bool:
    """Is a tensor's record of a known format, with a shape and, for factors, ranks and a sum of their products?"""
    if not isinstance(about, dict) or str(about.get("format")) not in ARRAYS or not _are_sizes(about.get("shape")):
        return False
    low_rank = about["format"] == "low_rank"
    return not low_rank or (_are_sizes(about.get("ranks")) and _is_term(about.get("terms"), len(about["ranks"])))


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _is_term(term: Any, products: int) -> bool:
    if type(term) is int:
        return 0 <= term < products
    return isinstance(term, list) and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is float and _is_term(pair[1], products) for pair in term
    )
