"""mergekit as an engine, for methods that paft lacks: paft folds each adapter in float32, mergekit merges the folds.

    adapter i ──> W + s_i·B_i·A_i, float32 ──> mergekit-yaml ──> W', float32 ──> rounded once, in the base's layout
                  └──────── in a scratch directory beside the output ────────┘

mergekit's own folding (a copy in the base's type, in a cache keyed by paths, used again after the adapter has changed)
is never run: it sees only full models. It runs in a process of its own, with a fixed hash seed, because it keeps
loaders and random state for the life of a process and orders models by hash.

Scratch space is four bytes per parameter for each adapter and for the result. It is removed in any case.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from paft.card import model_card
from paft.checkpoint import Checkpoint, Entry
from paft.delta import TILE_ELEMENTS, LoraDelta, tile_rows
from paft.errors import MismatchError, ResourceError
from paft.merge import engine, writer
from paft.merge.check import check_model
from paft.merge.inputs import Inputs, open_inputs
from paft.merge.mergekit.contracts import signature
from paft.merge.mergekit.writer import compose
from paft.merge.profile import profile
from paft.merge.settings import Input, Settings
from paft.models import free_cores
from paft.provenance import check_target, content_hash, output_dir, write_manifest

OLDEST = (0, 1, 5)
INSTALL = 'pip install "mergekit>=0.1.5"'
_START, _RATE, _IMPORTS = 10.0, 1e8, 1e9  # seconds until it works, bytes per second through it, bytes of its imports
Progress = Callable[[int, int, str], None]


def merge(
    inputs: Sequence[Input],
    *,
    base: str | None,
    method: str,
    parameters: dict[str, Any],
    weights: Sequence[float] | None,
    out: Path,
    dtype: str | None = None,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    check: bool | None = False,
) -> dict[str, Any]:
    """Merge with one of mergekit's methods, named as there; arguments and report as `paft.merge.engine.merge`'s.

    Raises UsageError for what mergekit's method does not take, MismatchError where the result lacks a tensor of the base
    or holds NaN, ResourceError without mergekit or without room for the folds; the target is then as it was.
    """
    out = Path(out)
    check_target(out, overwrite=overwrite)
    settings = Settings.read(signature(method), inputs, parameters, weights)
    opened = open_inputs(settings.inputs, base, allow_base_mismatch=allow_base_mismatch, weights=True)
    opened.check_apart(out)
    settings, names = settings.over(opened.base.entries), opened.touched()
    list(settings.distinct(names))  # refuses what cannot be
    recipe = {"kind": "merge", "engine": "mergekit", "method": method, **settings.record(opened.names),
              "base": opened.base_name, "dtype": dtype, "seed": seed}
    target = None if dtype is None else engine.DTYPES[dtype]
    started = time.monotonic()
    with _scratch(out, dry_run) as scratch:
        folds = [scratch / f"input-{i}" if isinstance(delta, LoraDelta) else path
                 for i, (delta, path) in enumerate(zip(opened.deltas, opened.paths, strict=True))]
        config = compose(method, settings.depth, dict(settings.common), [dict(rules) for rules in settings.rules],
                         base=_path(opened.base.path), models=[_path(fold) for fold in folds], dtype="float32")
        version = _version()
        need = _size(opened.base, torch.float32) * (1 + sum(isinstance(delta, LoraDelta) for delta in opened.deltas))
        if dry_run:
            return _estimate(opened, recipe, target, need) | {"profile": profile(settings, names, opened.names)}
        _check_room(out.parent, need + _size(opened.base, target))
        _fold(opened, folds, progress)
        with output_dir(out, overwrite=overwrite) as directory:
            _run(config, scratch, seed)
            report = _finish(opened, scratch / "merged", directory, recipe, target)
            report |= {"wall_s": round(time.monotonic() - started, 3), "scratch_bytes": need, "mergekit": version,
                       "check": check_model(directory, check)}
            _record(directory, opened, recipe, report)
    return report | {"out": str(out), "base": opened.reference}


def _record(directory: Path, opened: Inputs, recipe: dict[str, Any], report: dict[str, Any]) -> None:
    hashes = [{"name": name, "content_sha256": delta.content_hash}
              for name, delta in zip(opened.names, opened.deltas, strict=True)]
    origin = {"name": opened.base_name, "content_sha256": content_hash(opened.base.path)}
    seed = recipe["seed"]
    write_manifest(directory, command="paft merge", recipe=recipe, seed=seed, base=origin, inputs=hashes, metrics=report)


def _version() -> str:
    """The installed version; ResourceError where mergekit is missing or too old."""
    if importlib.util.find_spec("mergekit") is None:
        raise ResourceError("--engine mergekit needs the package mergekit", hint=INSTALL)
    version = importlib.metadata.version("mergekit")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        raise ResourceError(f"mergekit {version} is too old: its methods mean other things", hint=INSTALL)
    return version


@contextmanager
def _scratch(out: Path, dry_run: bool) -> Iterator[Path]:
    """A directory beside the output that vanishes with the block; for a dry run only its name."""
    if dry_run:
        yield out.parent / "scratch"
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    name = f".{out.name}."
    with tempfile.TemporaryDirectory(prefix=name, suffix=".partial", dir=out.parent, ignore_cleanup_errors=True) as made:
        yield Path(made)


def _path(path: Path) -> dict[str, Any]:
    """A reference that mergekit takes as it is, whatever signs the path contains."""
    return {"model": {"path": str(path.resolve())}}


def _size(base: Checkpoint, dtype: torch.dtype | None) -> int:
    """Bytes of the base's tensors in a float type; None keeps theirs."""
    return sum(entry.rows * entry.columns * writer.output_dtype(entry, dtype).itemsize if entry.is_float else entry.nbytes
               for entry in base.entries.values())


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ResourceError(f"the folded adapters and the result need {need / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB")


def _fold(opened: Inputs, folds: Sequence[Path], progress: Progress | None) -> None:
    """Every adapter as a full float32 model, by the native engine: its exact ΔW, rounded once."""
    for done, (fold, path) in enumerate(zip(folds, opened.paths, strict=True)):
        if progress is not None:
            progress(done, len(folds) + 1, opened.names[done])
        if fold != path:
            engine.merge([str(path)], base=str(opened.base.path), method="task_arithmetic", parameters={}, weights=None,
                         out=fold, dtype="float32", allow_base_mismatch=True)
    if progress is not None:
        progress(len(folds), len(folds) + 1, "mergekit")


def _run(config: dict[str, Any], scratch: Path, seed: int) -> None:
    """``mergekit-yaml`` in a process of its own; what it says last becomes the error."""
    file = scratch / "mergekit.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "mergekit.scripts.run_yaml", str(file), str(scratch / "merged"), "--quiet",
               "--no-write-model-card", "--random-seed", str(seed), "--num-threads", str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        whole = RuntimeError(done.stderr[-10_000:])  # what --traceback shows
        if done.returncode < 0 or re.search(r"MemoryError|out of memory|No space left", done.stderr):
            raise ResourceError(f"mergekit was stopped: {said[:200]}", hint="whole models need memory and disk") from whole
        raise MismatchError(f"mergekit failed: {said[:200]}", hint="--traceback shows all that it said") from whole


def _finish(opened: Inputs, merged: Path, out: Path, recipe: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Round what mergekit wrote into the base's layout, with the base's other files; every tensor of the base is there."""
    made, base, method = Checkpoint.open(merged), opened.base, recipe["method"]
    for name, entry in base.entries.items():
        if name not in made.entries or made.entries[name].shape != entry.shape:
            hint = "it does not know this architecture as the checkpoint stores it"
            raise MismatchError(f"mergekit left out {name}, or changed its shape", hint=hint)

    def tiles(entry: Entry, read: writer.Read) -> Iterator[torch.Tensor] | None:
        return _tiles(made, entry, read, writer.output_dtype(entry, dtype), method) if entry.is_float else None

    written = writer.write_tensors(base, out, dtype, tiles, free_cores(), lambda name: None)
    writer.write_companions(base, out, dtype)
    title = f"{opened.base_name} + {', '.join(opened.names)} ({method}, by mergekit)"
    (out / "README.md").write_text(model_card(title, base=opened.base_name, recipe=recipe), encoding="utf-8")
    return {"method": method, "engine": "mergekit", "seed": recipe["seed"], "parameters": recipe["parameters"],
            "weights": recipe["weights"], "adapters": [{"name": name} for name in opened.names],
            "bytes": {"read": written.read, "written": written.written},
            "tensors": {"merged": len(base.entries), "copied": 0}, "output_kind": "full"}


def _tiles(made: Checkpoint, entry: Entry, read: writer.Read, dtype: torch.dtype, method: str) -> Iterator[torch.Tensor]:
    step = tile_rows(entry.columns, TILE_ELEMENTS)
    for start in range(0, entry.rows, step):
        stop = min(start + step, entry.rows)
        read(start, stop)  # the base's bytes are hashed on the way
        tile = made.tile(entry.name, start, stop).to(dtype)
        if not torch.isfinite(tile).all():
            raise MismatchError(f"{entry.name}: mergekit's {method} gave NaN or infinity in {dtype}")
        yield tile


def _estimate(opened: Inputs, recipe: dict[str, Any], dtype: torch.dtype | None, need: int) -> dict[str, Any]:
    """What it would cost, roughly: everything in scratch is written once and read once, by mergekit on one core."""
    entries = opened.base.entries.values()
    read, written = sum(entry.nbytes for entry in entries), _size(opened.base, dtype)
    largest = max(entry.rows * entry.columns for entry in entries) * 4
    return {"dry_run": True, "recipe": recipe, "tensors": {"merged": len(opened.base.entries), "copied": 0},
            "bytes": {"read": read + need, "written": written, "scratch": need},
            "seconds": round(_START + (read + 2 * need + written) / _RATE, 2),
            "memory_bytes": int(_IMPORTS + largest * (3 * len(opened.deltas) + 3))}
