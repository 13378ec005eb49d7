"""`paft.json`, which says how an artefact was made, and the hashes by which it can be checked.

`write_manifest` records command, resolved recipe, seed, versions, content hashes and cost; `verify` names what has changed since.
`content_hash` depends on tensor names, dtypes, shapes and bytes alone, so it does not change when a file is copied, re-sharded or
its header re-ordered; it is a tree, so that tensors can be hashed in any order, while they are written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import resource
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paft.errors import MismatchError, NotFoundError
from paft.jsonfile import parse, read_header
from paft.store import WeightFile, remembered, weight_files
from paft.target import MANIFEST as MANIFEST  # an output and its manifest are used together
from paft.target import check_target as check_target
from paft.target import claim as claim
from paft.target import make_parent as make_parent
from paft.target import output_dir as output_dir
from paft.target import set_aside as set_aside
from paft.target import sweep as sweep
from paft.target import tidy as tidy
from paft.target import write_whole as write_whole

SCHEMA = 1
_CARD = "README.md"  # its owner may edit it
Tensors = Mapping[str, tuple[str, Sequence[int], str]]  # name -> (dtype, shape, hex sha256 of the bytes)


def tensor_files(path: Path) -> list[WeightFile]:
    """Every safetensors file of a model or adapter directory, sorted by name; behind a URL where they stayed there."""
    found = {name: file for name, file in weight_files(path).items() if "/" not in name}
    return [found.get(file.name, file) for file in sorted({path / name for name in found} | set(path.glob("*.safetensors")))]


def content_hash(path: Path) -> str:
    """`tree_hash` of every tensor in a directory's safetensors files.

    Of files behind a URL it is kept here, by what the service says of their content: each is hashed once, by ranges.
    """
    kept = remembered(tensor_files(path))
    if kept and kept.is_file():
        return kept.read_text(encoding="ascii")
    found = tree_hash(hash_tensors(path))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_suffix(f".{uuid.uuid4().hex}")
        scratch.write_text(found, encoding="ascii")
        os.replace(scratch, kept)
    return found


def hash_tensors(path: Path) -> dict[str, tuple[str, Sequence[int], str]]:
    """The type, shape and hash of every tensor in a directory's safetensors files; MismatchError for a broken or cut file."""
    where = [(file, *found) for file in tensor_files(path) for found in _entries(file)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter
        digests = list(pool.map(_digest, where))
    return {name: (entry["dtype"], entry["shape"], digest) for (_, name, _, entry), digest in zip(where, digests, strict=True)}


def tree_hash(tensors: Tensors) -> str:
    """sha256 over (name, dtype, shape, hex sha256 of the bytes) of every tensor, in order of name."""
    digest = hashlib.sha256()
    for name, (dtype, shape, tensor) in sorted(tensors.items()):
        digest.update(f"{name}\0{dtype}\0{list(shape)}\0{tensor}\0".encode())
    return digest.hexdigest()


def _digest(where: tuple[WeightFile, str, int, dict[str, Any]]) -> str:
    file, _, start, entry = where
    begin, end = entry["data_offsets"]
    return _hash_file(file, start + begin, end - begin)


def _hash_file(file: WeightFile, start: int, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        while size and (block := stream.read(min(size, 1 << 22))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _entries(file: WeightFile) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (name, offset of the data section, header entry) for each tensor; MismatchError for a broken or cut file."""
    header, start = read_header(file)
    yield from ((name, start, entry) for name, entry in header.items() if name != "__metadata__")


def _companions(directory: Path) -> dict[str, str]:
    """sha256 of every other file of an artefact but its card; artefacts inside it answer for themselves."""
    found: dict[str, str] = {}
    weights = {file.name for file in tensor_files(directory)}
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in (MANIFEST, _CARD) or path.name in weights:
            continue
        if path.is_dir() and not (path / MANIFEST).is_file():
            found |= {f"{path.name}/{name}": digest for name, digest in _companions(path).items()}
        elif path.is_file():
            found[path.name] = _hash_file(path, 0, path.stat().st_size)
    return found


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
    """Peak resident memory of this process so far, in MB (10^6 bytes).

    Linux's ``ru_maxrss`` begins with the peak of the process that started this one; VmHWM does not.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def write_manifest(directory: Path, *, command: str, recipe: dict[str, Any], seed: int | None, tensors: Tensors | None = None,
                   **extra: Any) -> dict[str, Any]:
    """Write ``paft.json`` into ``directory`` (complete but for its card) and return what was written.

    ``tensors``: their hashes where the caller has them already. ``extra`` holds whatever the stage knows: ``base``,
    ``inputs`` (name, hash), ``metrics``, ``wall_s``. A directory without tensors, such as a run's, records no files.
    """
    tensors = hash_tensors(directory) if tensors is None else tensors
    manifest = {"schema": SCHEMA, "command": command, "recipe": recipe, "seed": seed, "versions": versions(),
                "content_sha256": tree_hash(tensors), "peak_memory_mb": peak_memory_mb(), **extra}
    if tensors:
        manifest |= {"files": _companions(directory), "tensors": _brief(tensors)}
    write_whole(directory / MANIFEST, to_json(manifest))
    return manifest


def _brief(tensors: Tensors) -> dict[str, str]:
    """16 hex digits a tensor: enough to name the one that has changed; ``content_sha256`` is what proves that none has."""
    return {name: tree_hash({name: about})[:16] for name, about in tensors.items()}


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
        manifest = parse(file.read_text(encoding="utf-8"))
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
    """What differs between a directory and its ``paft.json``, one line each; an empty list means that nothing does.

    Raises NotFoundError where there is no ``paft.json``, MismatchError for a file that is cut.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise NotFoundError(f"{directory} has no {MANIFEST}", hint="only what paft made can be verified")
    tensors = hash_tensors(directory)
    found, recorded = tree_hash(tensors), str(manifest.get("content_sha256"))
    where = {name: f" in {file.name}" for file in tensor_files(directory) for name, _, _ in _entries(file)}
    differences = _compare("tensor ", manifest.get("tensors"), _brief(tensors), where) if found != recorded else []
    if found != recorded and not differences:  # an older manifest, or an edited one
        differences = [f"tensors: paft.json says {recorded[:12]}..., the files hash to {found[:12]}..."]
    return differences + _compare("", manifest.get("files"), _companions(directory))


def _compare(what: str, recorded: Any, found: Mapping[str, str], where: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    if not isinstance(recorded, dict):
        return []
    changed = [name for name in recorded if found.get(name, recorded[name]) != recorded[name]]
    return ([f"{what}{name} is missing" for name in recorded if name not in found]
            + [f"{what}{name}{where.get(name, '')} has changed" for name in changed]
            + [f"{what}{name}{where.get(name, '')} is not in {MANIFEST}" for name in found if name not in recorded])
