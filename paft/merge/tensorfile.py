"""A safetensors file written front to back while the sizes of its tensors are still being found out.

The header stands before the data but is known last, so room for it is kept and filled up with blanks, which the format
allows. The safetensors library needs all tensors in memory for one call; this holds none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from paft.checkpoint import FLOAT_NAMES

NAMES = {**FLOAT_NAMES, torch.int64: "I64", torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_ITEM = 140  # bytes of a header entry beside its name: type, shape and offsets of up to 20 digits each


def header_room(names: Sequence[str]) -> int:
    """Bytes that a header with these names can need at most, a multiple of 8."""
    size = sum(len(json.dumps(name, ensure_ascii=False).encode()) + _ITEM for name in names) + 64
    return -(-size // 8) * 8


class TensorFile:
    """An open file: `place` a tensor to get its offset, `write` at offsets in any order, then leave the ``with``."""

    def __init__(self, path: Path, room: int) -> None:
        self.path, self.room = path, room
        self.position = 8 + room
        self.header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        self.descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)

    @property
    def size(self) -> int:
        """Bytes of tensors placed so far."""
        return self.position - 8 - self.room

    def place(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
        """Reserve a tensor's bytes; returns where they begin in the file."""
        begin = self.size
        count = math.prod(shape) * dtype.itemsize
        self.header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + count]}
        self.position += count
        return 8 + self.room + begin

    def write(self, offset: int, tensor: torch.Tensor) -> int:
        """Write a tensor's bytes at an offset; returns where they end."""
        data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        view = memoryview(data)
        while len(view):
            done = os.pwrite(self.descriptor, view, offset)
            view, offset = view[done:], offset + done
        return offset

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Place and write a tensor that is in memory."""
        self.write(self.place(name, tensor.dtype, tensor.shape), tensor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.descriptor < 0:
            return
        try:
            if kind is None:
                text = json.dumps(self.header, separators=(",", ":"), ensure_ascii=False).encode()
                assert len(text) <= self.room, "the header outgrew its room"
                block = self.room.to_bytes(8, "little") + text.ljust(self.room)
                self.write(0, torch.frombuffer(bytearray(block), dtype=torch.uint8))
        finally:
            os.close(self.descriptor)
            self.descriptor = -1
