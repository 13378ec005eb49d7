"""A whole model written by several workers: each makes files of the output and reads only the tensors that these need.

    driver ──> histograms of |ΔW|, one worker a file, summed here ──> the threshold (global trimming alone)
           ──> .X.partial/part-*/FILE  by a worker, to its last byte ──> .X.partial/X/FILE ──> X, once, by the driver

A file of the base is the unit, as it is for ``--resume``. Sums of counts are exact, so nothing depends on who counts; a tensor's
bytes do not depend on who writes it. A file takes its place under its name by a rename when it is on the disk, so what a killed
worker leaves is in no model, and the next attempt begins the file again. The rare entries that equal a global threshold are
shared out by the driver, in one more pass.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from paft.checkpoint import Checkpoint, Entry
from paft.delta import Tiled
from paft.executor import Ask, Executor
from paft.merge.estimate import working
from paft.merge.global_trim import Count, Counts, histogram
from paft.merge.job import Job
from paft.merge.shards import Shards
from paft.merge.tally import Tally
from paft.merge.writer import Read, Written, write_tensors
from paft.parallel import Done


def counting(job: Job, room: Path, executor: Executor) -> Callable[[int], Count]:
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
                executor: Executor) -> Written:
    """`writer.write_tensors` by workers; what ``shards`` has finished is taken as it is."""
    done, base = Written(), job.inputs.base
    left = [file.name for file in base.files if file.name not in shards.done]
    for name in shards.done:
        done.take(*shards.of(name), progress)

    def finished(file: str, told: tuple[Written, dict[str, Tally]]) -> None:
        written, counted = told
        for name, tally in counted.items():
            vars(tallies[name]).update(vars(tally))
        shards.finish(file, written.base, written.out)
        done.read += written.read
        done.written += written.written
        done.take(written.base, written.out, progress)

    try:
        _each(left, partial(_write, job, out), finished, job, out.parent, executor)
    finally:
        for part in out.parent.glob("part-*"):
            shutil.rmtree(part, ignore_errors=True)
    for side in (done.base, done.out):  # in the base's order, as one process has them
        found = {name: side[name] for name in base.entries}
        side.clear()
        side.update(found)
    return done


def _write(job: Job, out: Path, file: str) -> tuple[Written, dict[str, Tally]]:
    """One file of the output, complete or absent."""
    own = part_of(job.inputs.base, file)
    tallies = {name: Tally(job.inputs.names) for name in own.entries if name in job.touched}

    def merged(entry: Entry, read: Read) -> Iterator[torch.Tensor] | None:
        return job.merged(entry, read, tallies[entry.name]) if entry.name in tallies else None

    room = out.parent / f"part-{uuid.uuid4().hex}"
    room.mkdir()
    threads = max(1, int(os.environ["OMP_NUM_THREADS"]))
    written = write_tensors(own, room, job.dtype, merged, threads, lambda name: None)
    os.rename(room / file, out / file)
    room.rmdir()
    return written, tallies


def part_of(base: Checkpoint, file: str) -> Checkpoint:
    """The tensors of one file."""
    entries = {name: entry for name, entry in base.entries.items() if entry.file.name == file}
    return replace(base, files=tuple(each for each in base.files if each.name == file), entries=entries)


def _each(files: list[str], work: Callable[[str], object], done: Done, job: Job, room: Path,
          executor: Executor) -> None:
    ask: Ask = executor.whole_node(working(job), gpu=job.device != "cpu")
    executor.graph(dict.fromkeys(files), work, workers=0, done=done, room=room, asks=dict.fromkeys(files, ask), show=False)
