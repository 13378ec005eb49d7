"""A delta out to a delta file, each tensor in its smallest exact form; `deltafile` has the format and reads it back.

    low_rank   where D is a sum of products that is smaller than D itself: the factors as they are, no pass over D
    others     a pass that counts non-zeros and rounds, then a pass that writes: dense, csr or bitmask, what is smallest

Besides the method's own passes that is two over D, and what is held is a tile and one number per row. Tensors that are
zero everywhere are left out.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from paft.adapter import Adapter
from paft.checkpoint import Checkpoint
from paft.delta import Delta, ProductTensor, Tiled
from paft.errors import MismatchError
from paft.merge.deltafile import CONFIG, INDEX, SCHEMA, SINGLE, sample_hash
from paft.merge.lowrank import product_energy
from paft.merge.merged import Term, factors, terms
from paft.merge.ops import Filter, tiles
from paft.merge.tensorfile import TensorFile, header_room

SHARD = 5 * 10**9
NOTHING = "the delta is zero everywhere: there is nothing to write"


@dataclass(frozen=True)
class Source:
    """A delta over its base, tensor by tensor, with what the outputs need to know: `Job.source` makes one of a merge.

    ``tensor`` plans and so may pass over the inputs; ``products`` says, without that, which products D is a sum of
    (None where it is no such sum). ``reference`` is the base as the user named it; ``deltas`` and ``adapters`` are the
    opened inputs. ``partial`` lets an adapter leave out what it cannot hold, as a part of its error.
    """

    base: Checkpoint
    reference: str
    names: Sequence[str]
    tensor: Callable[[str], Tiled]
    products: Callable[[str], list[ProductTensor] | None]
    deltas: Sequence[Delta]
    adapters: Sequence[Adapter]
    partial: bool = False


@dataclass(frozen=True)
class Pruned:
    """``keep(source)`` by rows; the error of pruning is taken against ``source``."""

    source: Tiled
    keep: Filter
    key: str = ""

    @property
    def rows(self) -> int:
        return self.source.rows

    @property
    def columns(self) -> int:
        return self.source.columns

    @property
    def step(self) -> int:
        return self.source.step

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return self.keep(self.source.tile(start, stop), start)


@dataclass
class _Scan:
    """What the first pass over a tensor finds: kept entries per row, non-zeros before, squares before, squares lost."""

    counts: list[int] = field(default_factory=list)
    before: int = 0
    energy: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)


@dataclass
class _Totals:
    entries: int = 0
    before: int = 0
    kept: int = 0
    dense_bytes: int = 0
    energy: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    unchanged: int = 0


def write_delta(
    source: Source,
    out: Path,
    *,
    dtype: torch.dtype | None,
    base_hash: str,
    progress: Callable[[str], None],
    shard: int = SHARD,
) -> dict[str, Any]:
    """Write the delta and `paft_delta.json` into ``out`` and return a report; values in ``dtype``, float32 by default.

    Factors are always float32. Raises MismatchError, by the tensor's name, for values that overflow the type, and for
    a delta that is zero everywhere.
    """
    kind, totals = dtype or torch.float32, _Totals()
    room = header_room([name + "#columns" for name in source.names for _ in range(3)])
    with _Shards(out, room, shard) as shards:
        for name in source.names:
            _write_tensor(name, source, kind, shards, totals)
            progress(name)
        if not totals.records:
            raise MismatchError(NOTHING, hint="the base is the result")
    base = {"name": source.reference, "content_sha256": base_hash}
    config = {"schema": SCHEMA, "base": base, "tensors": totals.records}
    (out / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    energy, lost = math.fsum(totals.energy), math.fsum(totals.lost)
    return {
        "tensors": {"merged": len(totals.records), "unchanged": totals.unchanged},
        "formats": dict(totals.formats),
        "entries": totals.entries,
        "nonzero": totals.kept,
        "kept_share": totals.kept / totals.before,
        "merged_norm": math.sqrt(energy),
        "relative_error": math.sqrt(lost / energy) if energy else 0.0,
        "bytes": {"written": shards.written, "dense": totals.dense_bytes},
    }


def _write_tensor(name: str, source: Source, dtype: torch.dtype, shards: _Shards, totals: _Totals) -> None:
    tensor, entry = source.tensor(name), source.base.entries[name]
    size = tensor.rows * tensor.columns
    products: list[ProductTensor] = []
    term = terms(tensor, products)
    factor_bytes = sum(4 * (p.left.numel() + p.right.numel()) for p in products)
    record: dict[str, Any] = {"shape": list(entry.shape), "base_sample_sha256": sample_hash(source.base, name)}
    if term is not None and factor_bytes < size * dtype.itemsize:
        energy = product_energy(*factors(tensor)) if products else 0.0  # type: ignore[misc]
        if energy == 0:
            totals.unchanged += 1
            return
        record |= {"format": "low_rank", **_write_product(name, term, products, shards)}
        before = kept = size
        lost = 0.0
    else:
        scan = _scan(name, tensor, dtype)
        before, kept, energy, lost = scan.before, sum(scan.counts), math.fsum(scan.energy), math.fsum(scan.lost)
        if kept:
            record |= {"format": _write_entries(name, tensor, entry.shape, dtype, scan.counts, shards)}
    totals.entries, totals.before, totals.kept = totals.entries + size, totals.before + before, totals.kept + kept
    totals.energy.append(energy)
    totals.lost.append(lost)
    if kept:
        totals.dense_bytes += size * dtype.itemsize
        totals.formats[record["format"]] += 1
        totals.records[name] = record
    else:
        totals.unchanged += 1


def _write_product(name: str, term: Term, products: list[ProductTensor], shards: _Shards) -> dict[str, Any]:
    left, right = torch.cat([p.left for p in products], dim=1), torch.cat([p.right for p in products])
    file = shards.room_for(left.nbytes + right.nbytes)
    file.add(name + "#left", left)
    file.add(name + "#right", right)
    return {"ranks": [p.left.shape[1] for p in products], "terms": term}


def _scan(name: str, tensor: Tiled, dtype: torch.dtype) -> _Scan:
    """The counting pass; raises MismatchError where a value does not fit into the type."""
    found = _Scan()
    keep = tensor.keep if isinstance(tensor, Pruned) else None
    for start, tile in tiles(tensor.source if isinstance(tensor, Pruned) else tensor):
        stored = (tile if keep is None else keep(tile, start)).to(dtype)
        if not torch.isfinite(stored).all():
            raise MismatchError(f"the delta of {name} does not fit into {dtype}", hint="leave the dtype at float32")
        found.counts += (stored != 0).sum(dim=1).tolist()
        found.before += int(tile.count_nonzero())
        wide = tile.double()
        found.energy += wide.square().sum(dim=1).tolist()
        found.lost += (stored.double() - wide).square().sum(dim=1).tolist()
    return found


def _write_entries(
    name: str, tensor: Tiled, shape: tuple[int, ...], dtype: torch.dtype, counts: list[int], shards: _Shards
) -> str:
    """The writing pass, in the format that takes the fewest bytes; returns its name."""
    rows, columns, count = tensor.rows, tensor.columns, sum(counts)
    narrow = torch.uint16 if columns <= 1 << 16 else torch.uint32
    width = -(-columns // 8)
    values = 8 * (rows + 1) + count * dtype.itemsize
    sizes = {
        "dense": rows * columns * dtype.itemsize,
        "csr": values + count * narrow.itemsize,
        "bitmask": values + rows * width,
    }
    form = min(sizes, key=lambda each: sizes[each])
    file = shards.room_for(sizes[form])
    if form == "dense":
        position = file.place(name, dtype, shape)
        for _, tile in tiles(tensor):
            position = file.write(position, tile.to(dtype))
        return form
    file.add(name + "#rows", torch.tensor([0, *counts]).cumsum(0))
    position = file.place(name + "#values", dtype, [count])
    packed = form == "bitmask"
    where = file.place(name + "#mask", torch.uint8, [rows, width]) if packed else file.place(name + "#columns", narrow, [count])
    end = position + count * dtype.itemsize
    for _, tile in tiles(tensor):
        stored = tile.to(dtype)
        chosen = stored != 0
        position = file.write(position, stored[chosen])
        where = file.write(where, _pack(chosen) if packed else chosen.nonzero()[:, 1].to(narrow))
    if position != end:
        raise MismatchError(f"{name} changed while it was read", hint="let nobody write to the inputs, and run it again")
    return form


def _pack(chosen: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(chosen.numpy(), axis=1, bitorder="little"))


class _Shards:
    """The files of one delta, each of at most ``limit`` bytes of tensors (or one tensor), named when all are known."""

    def __init__(self, out: Path, room: int, limit: int) -> None:
        self.out, self.room, self.limit = out, room, limit
        self.files: list[TensorFile] = []
        self.written = 0

    def room_for(self, size: int) -> TensorFile:
        """The file that takes the next ``size`` bytes."""
        if not self.files or (self.files[-1].size and self.files[-1].size + size > self.limit):
            self._close(None)
            self.files.append(TensorFile(self.out / f"{len(self.files)}.part", self.room))
        return self.files[-1]

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close(kind)
        if kind is not None:
            return
        count, placed = len(self.files), {}
        for number, file in enumerate(self.files, start=1):
            name = SINGLE if count == 1 else f"delta-{number:05d}-of-{count:05d}.safetensors"
            os.rename(file.path, self.out / name)
            placed |= dict.fromkeys([key for key in file.header if key != "__metadata__"], name)
        self.written = sum(file.position for file in self.files)
        if count > 1:
            index = {"metadata": {"total_size": sum(file.size for file in self.files)}, "weight_map": placed}
            (self.out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close(self, kind: type[BaseException] | None) -> None:
        if self.files:
            self.files[-1].__exit__(kind, None, None)
