"""Outputs that are complete or absent, and `paft.json`, which says how each was made.

`output_dir(target)` hands out a scratch directory beside the target and moves it into place when the block ends without an
error: a killed run leaves no directory that looks finished. `write_manifest` records command, resolved recipe, seed, versions,
content hashes and cost. `content_hash` depends on tensor names, dtypes, shapes and bytes alone, so it does not change when a file
is copied, re-sharded or its header re-ordered; it is a tree, so that tensors can be hashed in any order, while they are written.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paft.errors import MismatchError, NotFoundError, ResourceError

MANIFEST = "paft.json"
_FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit exceeded"}
SCHEMA = 1


def check_target(target: Path, *, overwrite: bool = False, in_place: bool = False) -> None:
    """Refuse a target that exists and is not an empty directory, unless ``overwrite``; raises MismatchError.

    The current directory and what lies above it are refused always: replacing them would delete more than an artefact.
    A mount point, such as a container's volume, cannot be replaced at all; an output that grows ``in_place`` may be one.
    """
    if target.is_dir():
        if Path.cwd().resolve().is_relative_to(target.resolve()):
            raise MismatchError(f"{target} is the current directory, or above it", hint="choose another -o DIR")
        if os.path.ismount(target.resolve()) and (overwrite or not in_place):
            raise MismatchError(f"{target} is a mount point and cannot be replaced", hint="choose a directory inside it")
        if not overwrite and any(target.iterdir()):
            raise MismatchError(f"{target} is not empty", hint="choose another -o DIR, or pass --overwrite")
    elif target.exists() or target.is_symlink():
        raise MismatchError(f"{target} is a file, not a directory", hint="choose another -o DIR")


def make_parent(target: Path) -> None:
    """Make the directory that ``target`` will lie in; NotFoundError or ResourceError where nothing can be written there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except PermissionError as error:
        raise NotFoundError(f"cannot write in {target.parent}: permission denied") from error
    except OSError as error:
        raise ResourceError(f"cannot write in {target.parent}: {error.strerror}") from error


@contextmanager
def output_dir(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a scratch directory that becomes ``target`` when the block succeeds and vanishes when it does not.

    With ``overwrite`` the old directory is moved aside first and removed only after the new one stands in its place.
    """
    check_target(target, overwrite=overwrite)
    given, target = target, Path(os.path.realpath(target))  # where a link leads, and the scratch directory beside that
    make_parent(target)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        _replace(scratch, target)
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(f"{_FULL[error.errno]} while writing {given}", hint="make room; nothing was kept") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(scratch: Path, target: Path) -> None:
    if not target.exists():
        os.rename(scratch, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        os.rename(target, aside / "old")
        try:
            os.rename(scratch, target)
        except OSError:
            os.rename(aside / "old", target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def set_aside(target: Path, *, aside: bool = True) -> Iterator[None]:
    """For outputs that grow in place: the old ``target`` is moved aside, removed if the block succeeds, put back if it fails."""
    if not (aside and target.exists()):
        yield
        return
    keep = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent)) / target.name
    os.rename(target, keep)
    try:
        yield
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(keep, target)
        raise
    finally:
        shutil.rmtree(keep.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tensor_files(path: Path) -> list[Path]:
    """Every safetensors file of a model or adapter directory, sorted by name."""
    return sorted(path.glob("*.safetensors"))


def content_hash(path: Path) -> str:
    """`tree_hash` of every tensor in a directory's safetensors files."""
    where = [(file, *found) for file in tensor_files(path) for found in _entries(file)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter
        digests = list(pool.map(_digest, where))
    return tree_hash({name: (entry["dtype"], entry["shape"], digest)
                      for (_, name, _, entry), digest in zip(where, digests, strict=True)})


def tree_hash(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """sha256 over (name, dtype, shape, hex sha256 of the bytes) of every tensor, in order of name."""
    digest = hashlib.sha256()
    for name, (dtype, shape, tensor) in sorted(tensors.items()):
        digest.update(f"{name}\0{dtype}\0{list(shape)}\0{tensor}\0".encode())
    return digest.hexdigest()


def _digest(where: tuple[Path, str, int, dict[str, Any]]) -> str:
    file, _, start, entry = where
    begin, end = entry["data_offsets"]
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start + begin)
        remaining = end - begin
        while remaining and (block := stream.read(min(remaining, 1 << 22))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


def _entries(file: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (name, offset of the data section, header entry) for each tensor; MismatchError for a broken or cut file."""
    size, found = file.stat().st_size, []
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if length <= size - 8 else None
            found = [(name, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"]  # type: ignore[union-attr]
            whole = all(entry["dtype"] and 0 <= entry["data_offsets"][0] <= entry["data_offsets"][1] <= size - 8 - length
                        and isinstance(entry["shape"], list) for _, _, entry in found)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            whole = False
    if not whole:
        raise MismatchError(f"{file} is not a complete safetensors file", hint="copy or download it again")
    yield from found


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; absent packages are left out."""
    found = {"python": sys.version.split()[0]}
    for package in ("paft", "torch", "transformers", "trl", "peft", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def write_manifest(directory: Path, *, command: str, recipe: dict[str, Any], seed: int | None, content_sha256: str | None = None,
                   **extra: Any) -> dict[str, Any]:
    """Write ``paft.json`` into ``directory`` (its tensors must be complete) and return what was written.

    ``content_sha256``: the tensors' hash where the caller has it already. ``extra`` holds whatever the stage knows: ``base``,
    ``inputs`` (name, hash), ``metrics``, ``wall_s``.
    """
    manifest = {"schema": SCHEMA, "command": command, "recipe": recipe, "seed": seed, "versions": versions(),
                "content_sha256": content_sha256 or content_hash(directory), "peak_memory_mb": peak_memory_mb(), **extra}
    (directory / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return manifest


def to_json(value: Any) -> str:
    """JSON text with NaN and infinity as null (JSON has neither), keys in the order given."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The ``paft.json`` of a directory, or None where there is none (somebody else's artefact)."""
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise MismatchError(f"{file} is not a JSON object", hint="delete it, or make the artefact again")
    return manifest


def recorded_base(directory: Path) -> str | None:
    """The content hash of the base that a directory's ``paft.json`` records, if it does."""
    base = (read_manifest(directory) or {}).get("base")
    recorded = base.get("content_sha256") if isinstance(base, dict) else None
    return recorded if isinstance(recorded, str) else None


def verify(directory: Path) -> list[str]:
    """What differs between a directory and its ``paft.json``; an empty list means that nothing does."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise NotFoundError(f"{directory} has no {MANIFEST}", hint="only what paft made can be verified")
    found = content_hash(directory)
    recorded = manifest.get("content_sha256")
    return [] if found == recorded else [f"tensors: paft.json says {str(recorded)[:12]}..., the files hash to {found[:12]}..."]
