"""Safetensors out in the base's own layout: the same files and order of tensors, untouched bytes copied undecoded.

    base file ──> read once, hashed ──> merged tile by tile, or copied ──> hashed, written at its own offset ──> output file

Every tensor's place in the output is known before it is computed, so tensors are worked on side by side by threads (the
matrix products, the kernels, hashing and file access let go of the interpreter), and the system reads ahead and writes
behind while they compute.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paft.checkpoint import FLOAT_NAMES, FLOATS, INDEX, Checkpoint, Entry, is_sharded
from paft.delta import TILE_ELEMENTS, tile_rows
from paft.errors import MismatchError
from paft.hub import WEIGHTS
from paft.jsonfile import read_header, read_json
from paft.merge.reader import Read, Reader, Source, opened, read_ahead, read_at
from paft.merge.shards import Hashes, Shards
from paft.provenance import tree_hash
from paft.store import WeightFile

Merged = Callable[[Entry, Read], Iterator[torch.Tensor] | None]

# Never copied from the base: weights in any form, and what describes the base's own directory.
_WEIGHTS = (*WEIGHTS, ".index.json")
_OWN = ("README.md", "paft.json", "adapter_config.json")
_SPAN = 1 << 22


@dataclass
class Written:
    """What was moved, and the content hashes of what was read and written."""

    read: int = 0
    written: int = 0
    base: Hashes = field(default_factory=dict)
    out: Hashes = field(default_factory=dict)

    def take(self, base: Hashes, out: Hashes, progress: Callable[[str], None]) -> None:
        """Count a file that an earlier process finished."""
        self.base |= base
        self.out |= out
        for name in out:
            progress(name)

    @property
    def base_hash(self) -> str:
        return tree_hash(self.base)


def write_tensors(base: Checkpoint, out: Path, dtype: torch.dtype | None, merged: Merged, threads: int,
                  progress: Callable[[str], None], shards: Shards | None = None) -> Written:
    """Write every file of the base's weights into ``out``, ``threads`` tensors at a time.

    ``merged(entry, read)`` yields the row tiles of a changed tensor in the output type, in order, having read every row of
    the base once, in order, by ``read(start, stop)`` (whose result lives until the next call and may be written to); it is
    None for a tensor that is copied: byte for byte when its type stays, else rounded to ``dtype``. It runs in a thread.
    """
    done, before = Written(), torch.get_num_threads()
    with ExitStack() as stack:
        syncer = stack.enter_context(ThreadPoolExecutor(1))
        pool = stack.enter_context(ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)))
        stack.callback(torch.set_num_threads, before)
        jobs: list[tuple[Entry, _Place, Future[tuple[str, str]]]] = []
        for file in base.files:
            if shards and file.name in shards.done:
                done.take(*shards.of(file.name), progress)
                continue
            source = opened(file, stack)
            target = os.open(out / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, target)
            for entry, place in _layout(file, base, dtype, source, target):
                jobs.append((entry, place, pool.submit(_write_one, entry, place, merged)))
        left, synced = Counter(place.target for _, place, _ in jobs), []

        def finish(target: int, file: WeightFile) -> None:
            os.fsync(target)
            if not shards:
                return
            names = [entry.name for entry, _, _ in jobs if entry.file == file]
            shards.finish(file.name, {name: done.base[name] for name in names}, {name: done.out[name] for name in names})

        try:
            for entry, place, job in jobs:
                read, wrote = job.result()
                done.base[entry.name] = (entry.dtype, entry.shape, read)
                done.out[entry.name] = (place.dtype, entry.shape, wrote)
                done.read += entry.nbytes
                done.written += place.nbytes
                progress(entry.name)
                left[place.target] -= 1
                if not left[place.target]:  # not before: a file that is written to waits for the disk
                    synced.append(syncer.submit(finish, place.target, entry.file))
            for sync in synced:
                sync.result()
        finally:  # no thread may hold a file when it is closed
            pool.shutdown(cancel_futures=True)
            syncer.shutdown(cancel_futures=True)
    return done


@dataclass(frozen=True)
class _Place:
    """Where one tensor's bytes go, and in which type."""

    source: Source
    target: int
    offset: int
    nbytes: int
    dtype: str


def _layout(file: WeightFile, base: Checkpoint, dtype: torch.dtype | None, source: Source,
            target: int) -> Iterator[tuple[Entry, _Place]]:
    """Write the header of an output file, give it its size, and yield the place of each of its tensors."""
    entries = [entry for entry in base.entries.values() if entry.file == file]
    header = _header(file, entries, dtype)
    _write_at(target, header, 0)
    position = len(header)
    for entry in entries:
        kind, size = _stored(entry, dtype)
        yield entry, _Place(source, target, position, size, kind)
        position += size
    os.ftruncate(target, position)


def _write_one(entry: Entry, place: _Place, merged: Merged) -> tuple[str, str]:
    """Make one tensor; the hex hashes of its bytes in the base and in the output."""
    reader = Reader(entry, place.source)
    read_ahead(entry, place.source)
    tiles = merged(entry, reader)
    if tiles is None and place.dtype == entry.dtype:
        same = _copy(entry, place)
        return same, same
    position, digest = place.offset, hashlib.sha256()
    for tile in tiles if tiles is not None else _rounded(entry, reader, FLOATS[place.dtype]):
        data = memoryview(tile.contiguous().view(-1).view(torch.uint8).numpy()) if tile.numel() else memoryview(b"")  # type: ignore[arg-type]
        digest.update(data)
        _write_at(place.target, data, position)
        position += len(data)
    assert (reader.row, position) == (entry.rows, place.offset + place.nbytes), entry.name
    return reader.digest.hexdigest(), digest.hexdigest()


def _copy(entry: Entry, place: _Place) -> str:
    """Copy a tensor's bytes inside the kernel where it can (some file systems then share them); their hash."""
    digest, buffer = hashlib.sha256(), bytearray(min(_SPAN, entry.nbytes))
    for begin in range(0, entry.nbytes, _SPAN):
        view = memoryview(buffer)[: min(_SPAN, entry.nbytes - begin)]
        read_at(place.source, view, entry.offset + begin, entry)
        digest.update(view)
        if entry.is_float and view and torch.frombuffer(view, dtype=FLOATS[entry.dtype]).isnan().any():
            raise MismatchError(f"the base's {entry.name} holds NaN", hint="copy or download the base again")
        done = 0
        try:
            while isinstance(place.source, int) and done < len(view):
                at = begin + done
                count = os.copy_file_range(place.source, place.target, len(view) - done, entry.offset + at, place.offset + at)
                if not count:
                    break
                done += count
        except (AttributeError, OSError) as error:
            known = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
            if isinstance(error, OSError) and error.errno not in known:
                raise
        _write_at(place.target, view[done:], place.offset + begin + done)
    return digest.hexdigest()


def _write_at(target: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)


def write_companions(base: Checkpoint, out: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer, chat template byte for byte; only a new dtype edits config and index."""
    for source in sorted(base.path.iterdir()):
        if source.is_dir() and source.name == "additional_chat_templates":
            shutil.copytree(source, out / source.name)
        hidden = source.name.startswith(".") or source.name in _OWN or source.name.endswith(_WEIGHTS)
        if source.is_file() and not hidden:
            shutil.copyfile(source, out / source.name)
    if is_sharded(base.path):
        shutil.copyfile(base.path / INDEX, out / INDEX)
    if dtype is not None and not all(_stays(entry, dtype) for entry in base.entries.values()):
        _record_dtype(base, out, dtype)


def output_dtype(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a float tensor of the base is written."""
    return dtype or FLOATS[entry.dtype]


def _stays(entry: Entry, dtype: torch.dtype | None) -> bool:
    return dtype is None or not entry.is_float or FLOATS[entry.dtype] == dtype


def _stored(entry: Entry, dtype: torch.dtype | None) -> tuple[str, int]:
    """The type and the bytes of a tensor in the output."""
    if not entry.is_float:
        return entry.dtype, entry.nbytes
    kind = output_dtype(entry, dtype)
    return FLOAT_NAMES[kind], entry.nbytes // FLOATS[entry.dtype].itemsize * kind.itemsize


def _header(file: WeightFile, entries: list[Entry], dtype: torch.dtype | None) -> bytes:
    header, data = read_header(file)
    if all(_stays(entry, dtype) for entry in entries):
        with file.open("rb") as stream:
            return stream.read(data)
    position = 0
    for entry in entries:
        kind, size = _stored(entry, dtype)
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, as the library writes it
    return len(text).to_bytes(8, "little") + text


def _rounded(entry: Entry, read: Read, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    step = tile_rows(entry.columns, TILE_ELEMENTS)
    for start in range(0, entry.rows, step):
        tile = read(start, min(start + step, entry.rows))
        out = tile.to(dtype)
        if not torch.equal(torch.isfinite(out), torch.isfinite(tile)):
            raise MismatchError(f"the base's {entry.name} does not fit into {str(dtype).removeprefix('torch.')}",
                                hint="leave out the dtype, or choose bfloat16")
        yield out


def _record_dtype(base: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = dict(base.config)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (out / INDEX).is_file():
        index = read_json(out / INDEX)
        size = sum(_stored(entry, dtype)[1] for entry in base.entries.values())
        index.setdefault("metadata", {})["total_size"] = size
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
