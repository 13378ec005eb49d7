"""Weights that stay behind their URL: a file that is read by ranges, in place of a Path.

    fetched/abcd.../NAME             the small files of a model
    fetched/abcd.../.weights.json    where its weights are: {url, files: {name: [bytes, key]}}

Only this cache is believed about it: no directory of a stranger's can name a URL.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from paft.errors import MismatchError
from paft.store.bucket import Blob, Bucket
from paft.store.cache import WHERE, home, object_of

_BLOCK = 4 << 20  # bytes of one request
_BLOCKS = 64  # of them that are kept: tensors at work, which a method may pass over more than once
KEPT = _BLOCK * _BLOCKS
_BUFFER = 1 << 16  # bytes of a header that come with its length


class _Stat(NamedTuple):
    st_size: int
    st_mtime_ns: int  # any number that changes with the content


@dataclass(frozen=True)
class Ranged:
    """The file ``name`` of a bucket, as far as paft uses a Path; ``parent`` is where its small companions are.

    Where this machine's cache has it, it is read here. Threads may share it, and it may be sent to other machines.
    """

    bucket: Bucket
    name: str
    blob: Blob
    parent: Path

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.name}"

    @property
    def here(self) -> Path | None:
        place = object_of(self.bucket, self.name, self.blob)
        return place if place.is_file() else None

    def stat(self) -> _Stat:
        return _Stat(self.blob.size, int(hashlib.sha256(self.blob.key.encode()).hexdigest()[:15], 16))

    def open(self, mode: str = "rb", buffering: int = -1) -> IO[Any]:
        """For reading bytes; without ``buffering`` each read is one request."""
        if here := self.here:
            return here.open("rb", buffering)
        raw: Any = _Stream(self)
        return raw if buffering == 0 else io.BufferedReader(raw, _BUFFER)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start:stop``; MismatchError where the file ends before."""
        found = self.bucket.read(self.name, start, stop) if stop > start else b""
        if len(found) != stop - start:
            raise MismatchError(f"{self} has changed while it was read", hint="start again when nobody writes it")
        return found

    def into(self, view: memoryview, offset: int, span: tuple[int, int]) -> None:
        """Fill ``view`` from ``offset`` on, in blocks of the tensor whose bytes are ``span``."""
        if here := self.here:
            with here.open("rb", buffering=0) as stream:
                stream.seek(offset)
                if stream.readinto(view) != len(view):
                    raise MismatchError(f"{here} is cut", hint="remove it: it is a copy")
            return
        first, last = span
        while view:
            start = first + (offset - first) // _BLOCK * _BLOCK
            block = _block(self, start, min(start + _BLOCK, last))
            part = memoryview(block)[offset - start :][: len(view)]
            view[: len(part)] = part
            view, offset = view[len(part) :], offset + len(part)


@functools.lru_cache(maxsize=_BLOCKS)
def _block(file: Ranged, start: int, stop: int) -> bytes:
    return file.read(start, stop)


class _Stream(io.RawIOBase):
    """A `Ranged` as an open file."""

    def __init__(self, file: Ranged) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.file.blob.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self.position + len(view), self.file.blob.size)
        found = self.file.read(self.position, max(stop, self.position))
        view[: len(found)] = found
        self.position += len(found)
        return len(found)


WeightFile = Path | Ranged


def weight_files(directory: Path) -> dict[str, Ranged]:
    """The weights of a directory that was fetched, by name; none for any other."""
    said = _said(directory)
    return {name: Ranged(Bucket(said["url"]), name, Blob(*about), directory) for name, about in said.get("files", {}).items()}


def source_of(directory: Path) -> str | None:
    """The URL that a directory was fetched from."""
    return _said(directory).get("url")


def _said(directory: Path) -> dict[str, Any]:
    where = directory.absolute().parent / WHERE
    known = where.parent.parent == home() / "fetched" and where.is_file()
    return json.loads(where.read_text(encoding="utf-8")) if known else {}


def weight_file(file: Path) -> WeightFile | None:
    """A file of weights, here or behind a URL, if there is one."""
    return weight_files(file.parent).get(file.name) or (file if file.is_file() else None)


def check_unchanged(files: Iterable[WeightFile]) -> None:
    """MismatchError where a file behind a URL is no longer the one that was opened."""
    opened = {file for file in files if isinstance(file, Ranged)}
    for bucket in {file.bucket for file in opened}:
        now = bucket.files()
        for file in opened:
            if file.bucket == bucket and now.get(file.name) != file.blob:
                raise MismatchError(f"{file} has changed while it was read", hint="start again when nobody writes it")


def remembered(files: Iterable[WeightFile]) -> Path | None:
    """Where a hash of these files may be kept: by what the service says of their content; None if one has no such key."""
    about = [(file.bucket.url, file.name, file.blob.size, file.blob.key) for file in files if isinstance(file, Ranged)]
    if not about or len(about) != len(list(files)):
        return None
    return home() / "hashes" / hashlib.sha256(repr(sorted(about)).encode()).hexdigest()
