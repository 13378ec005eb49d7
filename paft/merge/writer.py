"""Safetensors out in the base's own layout: the same files and order of tensors, untouched bytes copied undecoded."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from paft.checkpoint import FLOAT_NAMES, FLOATS, INDEX, Checkpoint, Entry, read_entries, read_header, read_json
from paft.delta import TILE_ELEMENTS, tile_rows

Tiles = Callable[[Entry], Iterator[torch.Tensor] | None]

# Never copied from the base: weights in any form, and what describes the base's own directory.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_OWN = ("README.md", "paft.json", "adapter_config.json")


def write_tensors(base: Checkpoint, out: Path, dtype: torch.dtype | None, merged: Tiles) -> dict[str, int]:
    """Write every file of the base's weights into ``out``.

    ``merged(entry)`` yields the row tiles of a changed tensor in the output type, or is None for one that is copied:
    byte for byte when its type stays, else rounded to ``dtype``. Returns ``{"read": bytes, "written": bytes}``.
    """
    written = 0
    for file in base.files:
        entries = [entry for entry in base.entries.values() if entry.file == file]
        with file.open("rb", buffering=0) as source, (out / file.name).open("wb", buffering=0) as target:
            written += _write_all(target, _header(file, entries, dtype))
            for entry in entries:
                tiles = merged(entry)
                if tiles is None and _stays(entry, dtype):
                    _copy_span(source, target, entry.offset, entry.nbytes)
                    written += entry.nbytes
                    continue
                for tile in tiles if tiles is not None else _rounded(base, entry, dtype):
                    written += _write_all(target, tile.contiguous().view(-1).view(torch.uint8).numpy())
    return {"read": sum(entry.nbytes for entry in base.entries.values()), "written": written}


def write_companions(base: Checkpoint, out: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer, chat template byte for byte; only a new dtype edits config and index."""
    for source in sorted(base.path.iterdir()):
        if source.is_dir() and source.name == "additional_chat_templates":
            shutil.copytree(source, out / source.name)
        hidden = source.name.startswith(".") or source.name in _OWN or source.name.endswith(_WEIGHTS)
        if source.is_file() and not hidden:
            shutil.copyfile(source, out / source.name)
    if (base.path / INDEX).is_file():
        shutil.copyfile(base.path / INDEX, out / INDEX)
    if dtype is not None and not all(_stays(entry, dtype) for entry in base.entries.values()):
        _record_dtype(base, out, dtype)


def output_dtype(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a float tensor of the base is written."""
    return dtype or FLOATS[entry.dtype]


def _stays(entry: Entry, dtype: torch.dtype | None) -> bool:
    return dtype is None or not entry.is_float or FLOATS[entry.dtype] == dtype


def _header(file: Path, entries: list[Entry], dtype: torch.dtype | None) -> bytes:
    header, data = read_header(file)
    if all(_stays(entry, dtype) for entry in entries):
        with file.open("rb") as stream:
            return stream.read(data)
    position = 0
    for entry in entries:
        kind = FLOAT_NAMES[output_dtype(entry, dtype)] if entry.is_float else entry.dtype
        size = entry.nbytes // FLOATS[entry.dtype].itemsize * FLOATS[kind].itemsize if entry.is_float else entry.nbytes
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, as the library writes it
    return len(text).to_bytes(8, "little") + text


def _rounded(base: Checkpoint, entry: Entry, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    step = tile_rows(entry.columns, TILE_ELEMENTS)
    for start in range(0, entry.rows, step):
        yield base.tile(entry.name, start, min(start + step, entry.rows)).to(output_dtype(entry, dtype))


def _record_dtype(base: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = dict(base.config)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (out / INDEX).is_file():
        index = read_json(out / INDEX)
        size = sum(entry.nbytes for file in base.files for entry in read_entries(out / file.name))
        index.setdefault("metadata", {})["total_size"] = size
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_all(target: BinaryIO, data: Any) -> int:
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    done = 0
    while done < len(view):
        done += target.write(view[done:])
    return done


def _copy_span(source: BinaryIO, target: BinaryIO, offset: int, size: int) -> None:
    """Copy bytes between files inside the kernel where it can, which on some file systems shares them."""
    while size:
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), size, offset)
        except (AttributeError, OSError) as error:
            known = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
            if isinstance(error, OSError) and error.errno not in known:
                raise
            count = 0
        if not count:
            source.seek(offset)
            count = _write_all(target, source.read(min(size, 1 << 22)))
        if not count:
            raise OSError(errno.EIO, "the base's file became shorter while it was copied")
        offset, size = offset + count, size - count
