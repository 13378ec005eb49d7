"""A model directory as named tensors that are read by row tiles, never whole.

`Checkpoint.open(path)` reads the safetensors headers of a single file or of the shards that an index names, and
checks that each file is complete. Rows are read with plain file reads, so that a 16 GB base costs no more memory than
one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paft.errors import MismatchError, NotFoundError
from paft.jsonfile import read_header, read_json
from paft.store import Ranged, WeightFile, weight_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: where its bytes lie, and its shape as a matrix.

    ``rows`` by ``columns`` is the shape with all but the last dimension folded; a vector is one row.
    """

    name: str
    file: WeightFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory, in the order of its files and of the bytes in them."""

    path: Path
    files: tuple[WeightFile, ...]
    entries: dict[str, Entry]
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers; raises NotFoundError without weights, MismatchError for damaged or unsafe files."""
        if not path.is_dir():
            raise NotFoundError(f"no model directory at {path}")
        files = _weight_files(path)
        entries: dict[str, Entry] = {}
        for file in files:
            for entry in read_entries(file):
                if entry.name in entries:
                    raise MismatchError(f"{path} holds the tensor {entry.name} twice")
                entries[entry.name] = entry
        _check_index(path, entries)
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        return cls(path, files, entries, config)

    def tile(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` of a tensor, ``[rows, columns]`` in the stored float type."""
        entry = self.entries[name]
        size = entry.columns * (entry.nbytes // max(1, math.prod(entry.shape)))
        buffer = bytearray((stop - start) * size)
        if not buffer:
            return torch.empty(stop - start, entry.columns, dtype=FLOATS[entry.dtype])
        read_into(entry, memoryview(buffer), start * size)
        return torch.frombuffer(buffer, dtype=FLOATS[entry.dtype]).view(stop - start, entry.columns)

    def raw(self, name: str) -> bytes:
        """All bytes of a tensor, of whatever type."""
        entry = self.entries[name]
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            return stream.read(entry.nbytes)


def read_into(entry: Entry, view: memoryview, start: int) -> None:
    """Fill ``view`` with a tensor's bytes from its ``start``-th on."""
    if isinstance(entry.file, Ranged):
        entry.file.into(view, entry.offset + start, (entry.offset, entry.offset + entry.nbytes))
        return
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.offset + start)
        if stream.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise MismatchError(f"{entry.file} ends inside {entry.name}", hint="copy or download it again")


def read_entries(file: WeightFile) -> Iterator[Entry]:
    """Every tensor of a safetensors file in the order of its bytes, which must fill the file without a gap."""
    header, data = read_header(file)
    items = [(name, item["dtype"], tuple(item["shape"]), *item["data_offsets"]) for name, item in header.items()
             if name != "__metadata__"]
    items.sort(key=lambda item: (item[3], item[4]))
    position = 0
    for name, dtype, shape, begin, end in items:
        if begin != position:
            raise MismatchError(f"{file}: the header's offsets of {name} do not fit", hint="copy or download it again")
        position = end
        yield Entry(name, file, dtype, shape, data + begin, end - begin)
    if data + position != file.stat().st_size:
        raise MismatchError(f"{file} is not a complete safetensors file", hint="copy or download it again")


def is_sharded(path: Path) -> bool:
    """Are the weights those that an index names? A single file goes before it, as in transformers."""
    return (path / INDEX).is_file() and weight_file(path / SINGLE) is None


def _weight_files(path: Path) -> tuple[WeightFile, ...]:
    if not is_sharded(path):
        if single := weight_file(path / SINGLE):
            return (single,)
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise MismatchError(f"{path} holds pickled weights only", hint="save the model as safetensors first")
        raise NotFoundError(f"{path} holds no {SINGLE}", hint="name the directory of a Hugging Face model")
    return indexed_files(path / INDEX)


def indexed_files(index: Path) -> tuple[WeightFile, ...]:
    """The safetensors files beside an ``index``, sorted by name; MismatchError for a name that leads elsewhere."""
    found: list[WeightFile] = []
    for name in sorted(set(_weight_map(index).values())):
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise MismatchError(f"{index} points outside its directory, or to no safetensors file: {name[:80]!r}")
        file = weight_file(index.parent / name) if len(name) <= 255 else None
        if file is None:
            raise NotFoundError(f"{index.parent / name[:80]} is missing", hint=f"{index.name} names it; download it again")
        found.append(file)
    return tuple(found)


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise MismatchError(f"{index} has no weight_map from tensors to files")
    return found


def _check_index(path: Path, entries: dict[str, Entry]) -> None:
    if not is_sharded(path):
        return
    for name, file in _weight_map(path / INDEX).items():
        if name not in entries or entries[name].file.name != file:
            raise MismatchError(f"{path / INDEX} places {name} in {file}, which does not hold it")
