"""The base's bytes as a merge that writes a whole model reads them: each tensor once, in order, hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack

import torch

from paft.checkpoint import FLOATS, Entry, read_into
from paft.errors import MismatchError
from paft.store import Ranged, WeightFile

Read = Callable[[int, int], torch.Tensor]
Source = int | Ranged  # an open file, or one behind a URL


def opened(file: WeightFile, stack: ExitStack) -> Source:
    """The file, until the stack is left."""
    if isinstance(file, Ranged):
        if (path := file.here) is None:
            return file
        file = path
    stack.callback(os.close, source := os.open(file, os.O_RDONLY))
    return source


def read_at(source: Source, view: memoryview, offset: int, entry: Entry) -> None:
    """Fill ``view`` with bytes of a tensor; MismatchError where its file ends before."""
    if isinstance(source, Ranged):
        read_into(entry, view, offset - entry.offset)
        return
    done = 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], offset + done)
        if not count:
            raise MismatchError(f"{entry.file} ends inside {entry.name}", hint="copy or download it again")
        done += count


def read_ahead(entry: Entry, source: Source) -> None:
    """Tell the disk to begin: a method passes over ΔW before it asks for W, and threads that share a file hide its order."""
    if isinstance(source, int) and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(source, entry.offset, entry.nbytes, os.POSIX_FADV_WILLNEED)


class Reader:
    """Reads the rows of one tensor of the base in order, into one buffer, and hashes them."""

    def __init__(self, entry: Entry, source: Source) -> None:
        self.entry, self.source, self.row = entry, source, 0
        self.digest, self.buffer = hashlib.sha256(), bytearray()

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        assert start == self.row, f"{self.entry.name} is read out of order"
        self.row = stop
        dtype = FLOATS[self.entry.dtype]
        size = self.entry.columns * dtype.itemsize
        if len(self.buffer) < (stop - start) * size:
            self.buffer = bytearray((stop - start) * size)
        if not size or start == stop:
            return torch.empty(stop - start, self.entry.columns, dtype=dtype)
        view = memoryview(self.buffer)[: (stop - start) * size]
        read_at(self.source, view, self.entry.offset + start * size, self.entry)
        self.digest.update(view)
        return torch.frombuffer(view, dtype=dtype).view(stop - start, self.entry.columns)
