"""What a merge would cost, for a dry run: time, memory and disk, writing nothing."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from paft.delta import tile_rows
from paft.merge import writer
from paft.merge.job import Job
from paft.merge.outputs import fit_output, preview
from paft.merge.profile import profile
from paft.merge.tally import Tally
from paft.preflight import check_disk, check_memory
from paft.progress import say
from paft.store import KEPT, Store, source_of

_COPY_RATE = 1e9  # bytes per second that a plain disk writes
_IMPORTS = 400e6  # bytes of memory that Python with torch takes before any work


def estimate(job: Job) -> dict[str, Any]:
    """What a merge would cost: the time of its middle-sized tensor, scaled by entries, plus the copying."""
    if job.inputs.recorded and not job.inputs.base_hash:
        say(f"note: {job.inputs.base_name} is compared with what the adapters record when it is read whole")
    entries = job.inputs.base.entries
    changed = sorted((entries[name] for name in job.touched), key=lambda entry: entry.rows * entry.columns)
    size = sum(entry.rows * entry.columns for entry in changed)
    sample = changed[len(changed) // 2]
    for _ in range(2):  # the first time loads the kernels
        started = time.monotonic()
        for _ in job.merged(sample, partial(job.inputs.base.tile, sample.name), Tally(job.inputs.names)):
            pass
    rate = (time.monotonic() - started) / max(1, sample.rows * sample.columns) / job.threads
    read, written = sum(entry.nbytes for entry in entries.values()), _written(job)
    counts = {"merged": len(changed), "copied": len(entries) - len(changed)}
    if job.output_kind != "full":
        part = preview(job.output_kind, job.source(), job.budget, job.dtype)
        counts, written = part["tensors"], part["written"]
    return {
        "dry_run": True,
        "recipe": job.recipe(),
        "tensors": counts,
        "bytes": {"read": read, "written": written},
        "profile": profile(job.settings, job.inputs.touched(), job.inputs.names),
        "seconds": round(rate * size + written / _COPY_RATE, 2),
        "memory_bytes": int(_IMPORTS + working(job)),
    }


def fits(job: Job, out: Path | Store) -> None:
    """ResourceError where disk or memory cannot suffice; nobody knows how much a URL has room for."""
    if isinstance(out, Path) and job.output_kind == "full":
        check_disk(out, _written(job))
    elif isinstance(out, Path):
        fit_output(out, preview(job.output_kind, job.source(), job.budget, job.dtype))
    check_memory("this merge", working(job), "set OMP_NUM_THREADS=1, or end other programs")


def _written(job: Job) -> int:
    """Bytes of a whole model."""
    return sum(
        entry.rows * entry.columns * writer.output_dtype(entry, job.dtype).itemsize if entry.is_float else entry.nbytes
        for entry in job.inputs.base.entries.values()
    )


def working(job: Job) -> int:
    """Bytes of memory for factors and tiles: of all tensors for an adapter, else of those at work; for blocks behind URLs."""
    entries = job.inputs.base.entries
    factors = [4 * f.a.shape[0] * sum(f.shape) for adapter in job.inputs.adapters for f in adapter.factors.values()]
    held = sum(factors) if job.output_kind == "lora" else max(factors, default=0) * 2 * job.threads
    tile = max((tile_rows(entries[name].columns, job.elements) * entries[name].columns for name in job.touched), default=0)
    blocks = KEPT if any(map(source_of, (job.inputs.base.path, *job.inputs.paths))) else 0
    return held + tile * 4 * (4 * len(job.inputs.deltas) + 12) + min(blocks, sum(e.nbytes for e in entries.values()))
