"""A run whose directory is a URL: each stage fetches what it reads, works on the disk of its node, and writes back what it made.

    driver    fetch all but the weights of merges ──> graphs of stages ──> publish the tables
    a stage   pull what it reads ──> work in `Store.here` ──> push what it made; meanwhile its newest checkpoint, its scores

A node that had a part in the run before has its files still. A training that is tried on another node goes on from its
checkpoint; the training that stands there under its name is the later one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from paft.errors import MismatchError
from paft.provenance import MANIFEST, check_target
from paft.runjob import Run
from paft.store import NOTE, Store, following
from paft.train.work import newest, place

ADAPTERS, MERGES, CONTROLS = "adapters", "merges", "rescaled"
_CACHES = ("merges.json", "scores.json")
_TABLES = (MANIFEST, "report.json", "report.md", "tradeoff.png", "sparsity.png", *_CACHES)


def check_free(target: Path | Store, *, overwrite: bool) -> None:
    """MismatchError for a target where something is that is not to be replaced."""
    if isinstance(target, Path):
        check_target(target, overwrite=overwrite, in_place=True)
    elif not overwrite and target.stands():
        raise MismatchError(f"{target} is not empty", hint="choose another -o URL, or pass --resume or --overwrite")


def clear(store: Store) -> None:
    """Nothing of an earlier run stays, there or here; an object store has no place to put it aside."""
    store.bucket.clear(NOTE)
    shutil.rmtree(store.here, ignore_errors=True)


def staged(job: Run, work: Callable[[Run, str], Any], *reads: str, makes: str) -> Callable[[str], Any]:
    """``work(job, name)`` as an executor calls it, by the name alone.

    Of a run behind a URL it ``reads`` the artefacts below these directories, and ``makes`` those of its name below another.
    """
    return partial(_at, job.there(), work, reads, makes)


def _at(job: Run, work: Callable[[Run, str], Any], reads: tuple[str, ...], makes: str, name: str) -> Any:
    if job.store is None:
        return work(job, name)
    store, job = job.store, replace(job, out=job.store.here)
    _pull(store, *reads)
    if not makes:
        store.pull_file(_CACHES[1])
        with following(partial(_send_scores, store)):
            found = work(job, name)
        _send_scores(store, None)  # the last of them, which no look has seen
        return found
    out = job.out / makes / name
    unfinished = _name(job, place(out))
    if not place(out).is_dir():
        store.pull(unfinished)
    with following(partial(_send_checkpoint, store, place(out), unfinished)):
        found = work(job, name)
    there = store.names()
    for each in _finished(job.out, makes):  # beside its own the trainings that estimated its optima
        if each == _name(job, out) or each not in there:
            store.push(each)
    store.remove(unfinished)
    return found


def fetch(job: Run, *only: str, weights: bool = True) -> None:
    """On the driver: what of the run is finished, as far as it is looked at here; perhaps without the ``weights`` of merges."""
    if job.store is None:
        return
    for name in only:
        job.store.pull(name)
    if not only:
        _pull(job.store, ADAPTERS, CONTROLS)
        _pull(job.store, MERGES, weights=weights and not job.executor.spreads)
        for name in _CACHES:
            job.store.pull_file(name)


def fetch_tables(store: Store) -> None:
    """Of a finished run what a comparison reads: its tables, and what its trainings cost."""
    _pull(store, ADAPTERS, weights=False)
    for name in _TABLES:
        store.pull_file(name)


def publish(job: Run, *below: str) -> None:
    """On the driver: the artefacts that it has made itself, below these directories, and the tables."""
    if job.store is None:
        return
    for name in _finished(job.out, *below):
        job.store.push(name)
    for name in _TABLES:
        elsewhere = job.executor.spreads and name == _CACHES[1]  # the node that measures writes them; here they are old
        if (job.out / name).is_file() and not elsewhere:
            job.store.push_file(name)


def _pull(store: Store, *below: str, weights: bool = True) -> None:
    for name in store.names():
        if name.split("/")[0] in below and not name.endswith(".partial"):
            store.pull(name, weights=weights)


def _finished(out: Path, *below: str) -> list[str]:
    """The artefacts below these directories that stand there complete."""
    found = [file.parent.relative_to(out) for each in below for file in sorted((out / each).rglob(MANIFEST))]
    return [path.as_posix() for path in found if not any(part.startswith(".") or ".partial" in part for part in path.parts)]


def _name(job: Run, path: Path) -> str:
    return path.relative_to(job.out).as_posix()


def _send_checkpoint(store: Store, directory: Path, name: str, last: Path | None) -> Path | None:
    """The newest checkpoint of a training, with a copy of its log, which grows meanwhile."""
    checkpoint = newest(directory)
    if checkpoint is not None and checkpoint != last:
        frozen = store.here / f".{directory.name}.sent"
        shutil.rmtree(frozen, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, frozen / checkpoint.name)
            for file in directory.iterdir():
                if file.is_file():
                    shutil.copyfile(file, frozen / file.name)
            store.push(name, frozen)
        finally:
            shutil.rmtree(frozen, ignore_errors=True)
    return checkpoint


def _send_scores(store: Store, last: int | None) -> int | None:
    file = store.here / _CACHES[1]
    changed = file.stat().st_mtime_ns if file.is_file() else None
    if changed != last:
        store.push_file(_CACHES[1])
    return changed
