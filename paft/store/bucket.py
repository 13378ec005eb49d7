"""Files behind a URL, by fsspec, with errors in one line.

    Bucket("s3://bucket/runs/first").files()     {"adapters/sft/paft.json": Blob(bytes, key), ...}

fsspec brings local files and memory, huggingface_hub brings ``hf://``; ``s3://`` needs s3fs, ``gs://`` gcsfs. Credentials are
what those find: environment, profile, instance role.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError, UsageError, first_line

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
_REFUSED = ("http", "https")  # they list no directory


def is_url(name: str) -> bool:
    """Is it ``scheme://...``?"""
    return _URL.match(name) is not None


@dataclass(frozen=True)
class Blob:
    """A file behind a URL: its size, and what changes when its content does (an ETag, a hash, a date)."""

    size: int
    key: str


@dataclass(frozen=True)
class Bucket:
    """The directory at ``url``; a name in it is relative, with slashes.

    Raises UsageError for a URL that nothing here opens, NotFoundError for what is not there or may not be seen, ResourceError
    for a service that does not answer or a package that is missing.
    """

    url: str

    def __post_init__(self) -> None:
        scheme = _URL.match(self.url)
        if not scheme or "::" in self.url or scheme[1] in _REFUSED or ".." in self.url.split("/"):
            raise UsageError(f"{self.url} is no directory that paft opens", hint="a path, s3://bucket/dir, gs://... or hf://...")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        scheme = self.url.split("://")[0]
        try:
            return url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            package = _PACKAGES.get(scheme, f"the fsspec package for {scheme}")
            raise ResourceError(f"{scheme}:// needs {package}", hint=f"pip install {package}") from error
        except ValueError as error:
            raise UsageError(f"{self.url}: {first_line(error)}", hint="s3://, gs://, hf:// or a path") from error

    def __getstate__(self) -> dict[str, Any]:  # a connection stays in its process
        return {"url": self.url}

    def inside(self, name: str) -> Bucket:
        return Bucket(f"{self.url}/{name}")

    def files(self) -> dict[str, Blob]:
        """Every file below, by its name."""
        with self._told("") as (fs, root):
            fs.invalidate_cache()
            found = fs.find(root, detail=True) if fs.exists(root) else {}
            top = root.rstrip("/") + "/"
            named = {path.removeprefix(top): info for path, info in found.items() if path.startswith(top)}
            return {_safe(self.url, name): Blob(int(info["size"]), _key(info)) for name, info in sorted(named.items())}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes ``start:stop`` of a file: a range read."""
        with self._told(name) as (fs, root):
            whole = start == 0 and stop is None  # S3 has no range of an empty file
            return fs.cat_file(f"{root}/{name}") if whole else fs.cat_file(f"{root}/{name}", start=start, end=stop)

    def get(self, name: str, file: Path) -> None:
        """A file behind the URL into ``file``."""
        with self._told(name) as (fs, root):
            fs.get_file(f"{root}/{name}", str(file))

    def put(self, file: Path, name: str) -> None:
        with self._told(name) as (fs, root):
            _make_parent(fs, f"{root}/{name}")
            fs.put_file(str(file), f"{root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        with self._told(name) as (fs, root):
            _make_parent(fs, f"{root}/{name}")
            fs.pipe_file(f"{root}/{name}", data)

    def has(self, name: str) -> bool:
        with self._told(name) as (fs, root):
            fs.invalidate_cache()
            return fs.exists(f"{root}/{name}")

    def about(self, name: str) -> Blob:
        """Size and key of one file, as `files` has them."""
        with self._told(name) as (fs, root):
            fs.invalidate_cache()
            info = fs.info(f"{root}/{name}")
            return Blob(int(info["size"]), _key(info))

    def remove(self, name: str) -> None:
        """A file, or all below a name, if it is there."""
        with self._told(name) as (fs, root):
            path = f"{root}/{name}"
            fs.invalidate_cache()
            if fs.exists(path):
                fs.rm(path, recursive=True)

    def clear(self, *keep: str) -> None:
        """Remove all below, but these files."""
        for name in {each.split("/")[0] for each in self.files()} - set(keep):
            self.remove(name)

    def tidy(self) -> None:
        """Remove the directory, where it is one of a disk and no file is in it."""
        fs, root = self._opened
        if _is_disk(fs) and not self.files():
            for path, _, _ in os.walk(root, topdown=False):
                with suppress(OSError):
                    os.rmdir(path)

    @contextmanager
    def _told(self, name: str) -> Iterator[tuple[Any, str]]:
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield self._opened
        except PaftError:
            raise
        except FileNotFoundError as error:
            raise NotFoundError(f"no {where}", hint="check the URL") from error
        except PermissionError as error:
            raise NotFoundError(f"{where} may not be used: permission denied", hint="check the credentials") from error
        except Exception as error:  # each service raises errors of its own
            raise ResourceError(f"{where}: {type(error).__name__}: {first_line(error)}",
                                hint="check the network, the endpoint and the credentials") from error


def _make_parent(fs: Any, path: str) -> None:
    """Only a disk has directories that must be made."""
    if _is_disk(fs):
        fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)


def _is_disk(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def _key(info: dict[str, Any]) -> str:
    """What a service says of a file's content; the date where it says no more."""
    known = [info[name] for name in ("ETag", "etag", "md5Hash", "xet_hash", "oid", "blob_id", "mtime", "LastModified", "created")
             if info.get(name)]
    return f"{info['size']}-{known[0] if known else ''}"


def is_inside(name: str) -> bool:
    """Does a name lead to a place below, and nowhere else?"""
    return not (name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name)


def _safe(url: str, name: str) -> str:
    if not is_inside(name):
        raise MismatchError(f"{url} holds a file whose name leads elsewhere: {name[:80]!r}")
    return name
