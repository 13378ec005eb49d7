"""A whole model written by several workers: each makes files of the output and reads only the tensors that these need.

    driver ──> histograms of |ΔW|, one worker a file, summed here ──> the threshold (global trimming alone)
           ──> .X.partial/part-*/FILE  by a worker, to its last byte ──> .X.partial/X/FILE ──> X, once, by the driver

A file of the base is the unit, as it is for ``--resume``. Sums of counts are exact, so nothing depends on who counts; a tensor's
bytes do not depend on who writes it. A file takes its place under its name by a rename when it is on the disk, so what a killed
worker leaves is in no model, and the next attempt begins the file again. The rare entries that equal a global threshold are
shared out by the driver, in one more pass.

Where the output is behind a URL, no disk is shared: a worker writes its file on its own disk and puts it there; the driver puts
the record of those that are finished, the small files, and last the list of all, without which nothing is there (`There`).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paft.checkpoint import Checkpoint, Entry
from paft.delta import Tiled
from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError, UsageError
from paft.executor import Ask, Executor
from paft.merge.check import SMALL, check_model
from paft.merge.estimate import working
from paft.merge.global_trim import Count, Counts, histogram
from paft.merge.job import Job
from paft.merge.shards import RECORD, Shards
from paft.merge.tally import Tally
from paft.merge.writer import Read, Written, write_tensors
from paft.parallel import Done
from paft.store import NOTE, Blob, Store, check_sole, is_lost, sole
from paft.store.artefacts import LIST
from paft.store.cache import digest_of
from paft.target import claim, no_room

_WORK, _THERE = ".work", "there.json"


@dataclass
class There:
    """A model behind a URL; of each file that workers have put there its sha256, its size, and what the service says of it.

        URL/.work/shards.json     which files are finished (`paft.merge.shards`)
        URL/.work/there.json      what ``files`` holds
        URL/.work/logs            of the workers
    """

    store: Store
    files: dict[str, tuple[str, int, str]] = field(default_factory=dict)

    @property
    def room(self) -> Store:
        """What is there until the model is whole."""
        return self.store / _WORK

    @contextmanager
    def making(self, *, overwrite: bool, resume: bool, quiet: bool = False) -> Iterator[Path]:
        """A directory of this machine for all but the weights, which goes behind the URL at the end.

        An error leaves nothing there; with ``resume`` all but a MismatchError or UsageError leave the finished files.
        """
        with ExitStack() as stack:
            stack.enter_context(sole(self.store.bucket, quiet=quiet))
            stack.callback(self._leave)
            room = stack.enter_context(claim(self.store.here / "model"))
            if not overwrite and not self._is_free(resume):
                raise MismatchError(f"{self.store} is not empty", hint="choose another -o URL, or pass --overwrite")
            try:
                if overwrite:
                    self._remove()
                scratch = room / "model"
                scratch.mkdir()
                self._begin(room)
                yield scratch
                check_sole(self.store.bucket)
                self._finish(scratch)
            except BaseException as error:
                self._end(error, resume)
                raise
            finally:
                for each in (*self.store.here.iterdir(), self.room.here):
                    if each != room:
                        shutil.rmtree(each, ignore_errors=True)

    def _leave(self) -> None:
        with suppress(OSError):  # another process of this machine has its claim there
            self.store.here.rmdir()

    def _is_free(self, resume: bool) -> bool:
        return not self.store.stands() or (resume and self.room.bucket.has(RECORD))

    def _begin(self, room: Path) -> None:
        """What an earlier driver has recorded, or a record of nothing: from here on ``resume`` knows whose the files are."""
        if not self.room.bucket.has(RECORD):
            self.room.bucket.write(RECORD, b"{}")
            return
        self.room.bucket.get(RECORD, room / RECORD)
        with suppress(NotFoundError, ValueError, TypeError, AttributeError, IndexError):
            self.files = {name: (about[0], about[1], about[2])
                          for name, about in json.loads(self.room.bucket.read(_THERE)).items()}

    def _end(self, error: BaseException, resume: bool) -> None:
        """After an error: the finished files stay, or nothing does; but what has become another's is let alone."""
        with suppress(PaftError):
            check_sole(self.store.bucket)
        if is_lost(self.store.bucket):
            return
        if not self.files or not resume or isinstance(error, MismatchError | UsageError):
            with suppress(PaftError):
                self._remove()
        elif isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; what is finished of {self.store} is kept there",
                                    "the same command with --resume goes on") from None
        if full := no_room(error):
            raise ResourceError(f"{full} while writing {self.store}", hint="make room, also on the workers; "
                                + ("the same command with --resume goes on" if resume else "nothing was kept")) from error

    def is_whole(self) -> bool:
        return self.store.bucket.has(LIST)

    def standing(self) -> Callable[[str], bool]:
        """Whether a file is still what a worker has put there; forgets those that are not."""
        now = self.store.bucket.files()
        self.files = {name: about for name, about in self.files.items() if name in now and now[name] == Blob(*about[1:])}
        return self.files.__contains__

    def keep(self, files: Collection[str]) -> None:
        """Of what is there only these stay: the others are of a file that was begun, or of another merge."""
        self.files = {name: about for name, about in self.files.items() if name in files}
        self.store.bucket.clear(NOTE, _WORK, *self.files)

    def put(self, file: str, sha256: str, record: Path) -> None:
        """A worker has put a file there."""
        blob = self.store.bucket.about(file)
        self.files[file] = (sha256, blob.size, blob.key)
        self.room.bucket.write(_THERE, json.dumps(self.files).encode())
        self.room.bucket.put(record, RECORD)

    def _finish(self, scratch: Path) -> None:
        parent, name = self.store.apart()
        parent.push(name, scratch, {file: about[0] for file, about in self.files.items()})
        self.tidy()

    def tidy(self) -> None:
        """The model is whole: what it was made by goes."""
        with suppress(PaftError):
            self.store.bucket.remove(_WORK)

    def _remove(self) -> None:
        parent, name = self.store.apart()
        parent.remove(name)

    def check(self, scratch: Path, check: bool | None) -> dict[str, Any] | None:
        """`check_model`, for which the weights of a small model come here."""
        if check is False or (check is None and sum(size for _, size, _ in self.files.values()) > SMALL):
            return None
        try:
            for name in self.files:
                self.store.bucket.get(name, scratch / name)
            return check_model(scratch, check)
        finally:
            for name in self.files:
                (scratch / name).unlink(missing_ok=True)


def counting(job: Job, room: Path | Store, executor: Executor) -> Callable[[int], Count]:
    """For `Job.with_trims`: the entries of the i-th delta, counted by the workers, a file of the base each."""

    def of(place: int) -> Count:
        reach = job.reach[place]
        files = {entry.file.name for name, entry in job.inputs.base.entries.items() if name in reach}

        def count(level: int, prefix: int) -> Counts:
            parts: list[Counts] = []
            work = partial(_count, job, place, level, prefix)
            _each(sorted(files), work, lambda _, found: parts.append(found), job, room, executor)
            return torch.stack([found for found, _ in parts]).sum(0), max(width for _, width in parts)

        return count

    return of


def _count(job: Job, place: int, level: int, prefix: int, file: str) -> Counts:
    delta = job.inputs.deltas[place]

    def tensors() -> Iterable[tuple[str, Tiled]]:
        entries = job.inputs.base.entries
        return ((name, delta.tensor(name, job.elements)) for name in job.reach[place] if entries[name].file.name == file)

    return histogram(tensors, level, prefix)


def write_files(job: Job, out: Path, tallies: dict[str, Tally], progress: Callable[[str], None], shards: Shards,
                executor: Executor, there: There | None = None) -> Written:
    """`writer.write_tensors` by workers, into ``out`` or ``there``; what ``shards`` has finished is taken as it is."""
    done, base = Written(), job.inputs.base
    left = [file.name for file in base.files if file.name not in shards.done]
    if there:
        there.keep(shards.done)
    for name in shards.done:
        done.take(*shards.of(name), progress)

    def finished(file: str, told: tuple[Written, dict[str, Tally], str | None]) -> None:
        written, counted, sha256 = told
        for name, tally in counted.items():
            vars(tallies[name]).update(vars(tally))
        shards.finish(file, written.base, written.out)
        if there and sha256:
            there.put(file, sha256, shards.file)
        done.read += written.read
        done.written += written.written
        done.take(written.base, written.out, progress)

    try:
        work = partial(_write, job, there.store if there else out)
        _each(left, work, finished, job, there.room if there else out.parent, executor)
    finally:
        for part in out.parent.glob("part-*"):
            shutil.rmtree(part, ignore_errors=True)
    for side in (done.base, done.out):  # in the base's order, as one process has them
        found = {name: side[name] for name in base.entries}
        side.clear()
        side.update(found)
    return done


def _write(job: Job, out: Path | Store, file: str) -> tuple[Written, dict[str, Tally], str | None]:
    """One file of the output, complete or absent, and of one behind a URL its sha256."""
    own = part_of(job.inputs.base, file)
    tallies = {name: Tally(job.inputs.names) for name in own.entries if name in job.touched}

    def merged(entry: Entry, read: Read) -> Iterator[torch.Tensor] | None:
        return job.merged(entry, read, tallies[entry.name]) if entry.name in tallies else None

    room = (out.here if isinstance(out, Store) else out.parent) / f"part-{uuid.uuid4().hex}"
    room.mkdir(parents=isinstance(out, Store))
    threads, sha256 = max(1, int(os.environ["OMP_NUM_THREADS"])), None
    try:
        written = write_tensors(own, room, job.dtype, merged, threads, lambda name: None)
        if isinstance(out, Store):
            sha256 = digest_of(room / file)
            out.bucket.put(room / file, file)
        else:
            os.rename(room / file, out / file)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return written, tallies, sha256


def part_of(base: Checkpoint, file: str) -> Checkpoint:
    """The tensors of one file."""
    entries = {name: entry for name, entry in base.entries.items() if entry.file.name == file}
    return replace(base, files=tuple(each for each in base.files if each.name == file), entries=entries)


def _each(files: list[str], work: Callable[[str], object], done: Done, job: Job, room: Path | Store,
          executor: Executor) -> None:
    ask: Ask = executor.whole_node(working(job), gpu=job.device != "cpu")
    executor.graph(dict.fromkeys(files), work, workers=0, done=done, room=room, asks=dict.fromkeys(files, ask), show=False)
