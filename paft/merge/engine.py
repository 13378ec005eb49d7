"""Deltas through a method into a model or an adapter, tensor by tensor in row tiles; never a second copy of the model.

For each tensor that a delta touches: the method makes a plan in passes over ΔW tiles; then each tile of W is read
once, and

    W' = round(W + D),   D = plan(ΔW_1, ..., ΔW_n)

is computed in float32 and rounded once. Where D is zero the base's bits stay. Everything else is copied undecoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from paft.card import model_card
from paft.checkpoint import FLOATS, Entry
from paft.delta import TILE_ELEMENTS
from paft.errors import MismatchError, UsageError, did_you_mean
from paft.executor import LOCAL, Executor
from paft.merge import writer
from paft.merge.check import check_model
from paft.merge.device import DEVICES, check_device
from paft.merge.estimate import estimate, fits
from paft.merge.inputs import open_inputs
from paft.merge.job import Job
from paft.merge.outputs import find_budget, write_output
from paft.merge.settings import Input, Settings, native
from paft.merge.shards import Shards, finished, key_of
from paft.merge.spread import There, counting, write_files
from paft.merge.tally import Tally
from paft.merge.writer import Read
from paft.models import free_cores
from paft.progress import say
from paft.provenance import Tensors, check_target, content_hash, output_dir, tidy, write_manifest
from paft.store import Store, fetched, is_url, making

Progress = Callable[[int, int, str], None]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
ROUNDINGS = ("nearest", "stochastic")
OUTPUT_KINDS = ("full", "lora", "delta")


def merge(
    inputs: Sequence[Input],
    *,
    base: str | None,
    method: str,
    parameters: dict[str, Any],
    weights: Sequence[float] | None,
    out: Path | str | Store,
    dialect: str = "mergekit",
    dtype: str | None = None,
    rounding: str = "nearest",
    device: str = "cpu",
    seed: int = 0,
    output_kind: str = "full",
    rank: int | None = None,
    max_error: float | None = None,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    tile_elements: int = TILE_ELEMENTS,
    threads: int | None = None,
    check: bool | None = False,
    resume: bool = False,
    executor: Executor = LOCAL,
) -> dict[str, Any]:
    """Merge adapters or fine-tuned models into ``out`` and return a report; with ``dry_run`` the plan, writing nothing.

    ``inputs`` and ``base`` are paths, URLs or hub ids; ``base`` None is the one that the adapters name. An input may be
    ``{"adapter": PATH, "weight": V, ...}``; values may vary over the model (`paft.merge.settings`). ``weights`` is one number
    per input, 1 each by default. ``dtype`` None keeps the base's; ``rounding`` stochastic keeps small deltas on average.
    ``rank`` or ``max_error`` cut an adapter (``output_kind`` lora) and are needed where the method is not linear in the
    deltas. ``tile_elements`` bounds the memory and ``threads`` (one a core) the tensors at work; neither changes a byte.
    ``check`` loads a whole model and looks at its logits before it is put in place; None: a small one (`paft.merge.check`).
    ``resume`` takes the files that a killed merge has finished (`paft.merge.shards`), keeps them at an interrupt, and takes an
    ``out`` that the same merge has made already for what it is. ``executor``: who writes the files (`paft.merge.spread`).
    Raises UsageError for wrong parameters, MismatchError for inputs that do not fit together or a target that is not empty,
    NotFoundError, ResourceError; the target is then as it was.
    """
    out = _free(out, overwrite=overwrite or (resume and not dry_run))
    settings = Settings.read(native(method, dialect), inputs, parameters, weights)
    _check_output(output_kind, rounding, device)
    kind = None if dtype is None else DTYPES[_known("dtype", dtype, DTYPES)]
    budget = find_budget(output_kind, rank, max_error, kind)
    opened = open_inputs(settings.inputs, base, allow_base_mismatch=allow_base_mismatch, hash_later=output_kind == "full")
    job = Job(opened, method, settings.over(opened.base.entries), dialect, seed, kind, output_kind, tile_elements,
              threads or free_cores(), budget, rounding, device)
    job.check_parameters()
    opened.check_apart(out)
    return estimate(job) if dry_run else _make(job, out, progress, executor, overwrite, check, resume)


def _make(job: Job, out: Path | Store, progress: Progress | None, executor: Executor, overwrite: bool, check: bool | None,
          resume: bool) -> dict[str, Any]:
    if executor.spreads and job.output_kind != "full":
        raise UsageError("only a whole model is spread over workers", hint="leave out --executor: the others take little time")
    if resume and job.output_kind != "full":
        raise UsageError("only a whole model is resumed, file by file", hint="leave out --resume: the others take little time")
    whole, named = check if job.output_kind == "full" else False, {"out": str(out), "base": job.inputs.reference}
    if isinstance(out, Store) and executor.spreads:
        return _make_there(job, There(out), progress, executor, overwrite, whole, resume) | named
    if isinstance(out, Store):
        with making(out, overwrite=overwrite, resume=resume) as place:
            return _make(job, place, progress, executor, overwrite, check, resume) | named
    if resume and not overwrite and (known := _known_already(job, out, executor.quiet, str(out))):
        return {**known, "check": check_model(out, whole), **named}
    check_target(out, overwrite=overwrite)
    fits(job, out)
    executor.join()
    with output_dir(out, overwrite=overwrite, resume=resume) as scratch:
        counted = counting(job, scratch.parent, executor) if executor.spreads else None
        report = _write(job.with_trims(counted), scratch, _Steps(progress, len(job.inputs.base.entries)), executor)
        report["check"] = check_model(scratch, whole)
    return report | named


def _make_there(job: Job, there: There, progress: Progress | None, executor: Executor, overwrite: bool,
                check: bool | None, resume: bool) -> dict[str, Any]:
    name = str(there.store)
    if resume and not overwrite and there.is_whole():
        known = _known_already(job, fetched(name, weights=False), executor.quiet, name)
        if known:
            there.tidy()
            return {**known, "check": None}
    fits(job, there.store)
    executor.join()
    with there.making(overwrite=overwrite, resume=resume, quiet=executor.quiet) as scratch:
        job = job.with_trims(counting(job, there.room, executor))
        report = _write(job, scratch, _Steps(progress, len(job.inputs.base.entries)), executor, there)
        report["check"] = there.check(scratch, check)
    return report


def _free(out: Path | str | Store, *, overwrite: bool) -> Path | Store:
    """``out``, with nothing in its place."""
    if isinstance(out, str) and is_url(out):
        out = Store(out)
    if not isinstance(out, Store):
        check_target(out := Path(out), overwrite=overwrite)
    elif out.apart() and not overwrite and out.stands():
        raise MismatchError(f"{out} is not empty", hint="choose another -o URL, or pass --overwrite")
    return out


def _known_already(job: Job, out: Path, quiet: bool, name: str) -> dict[str, Any] | None:
    opened = job.inputs
    found = finished(out, job.recipe(), opened.described(), lambda: opened.base_hash or content_hash(opened.base.path))
    if found:
        tidy(out)
        say(f"{name} is finished already", quiet=quiet)
    return found


def _check_output(kind: str, rounding: str, device: str) -> None:
    _known("output kind", kind, OUTPUT_KINDS)
    if _known("device", device, DEVICES) != "cpu" and kind != "full":
        raise UsageError(f"only a whole model is computed on {device}", hint="leave out the device")
    check_device(device)
    if _known("rounding", rounding, ROUNDINGS) != "nearest" and kind != "full":
        raise UsageError("only a whole model is rounded", hint="leave out the rounding")


def _write(job: Job, scratch: Path, steps: _Steps, executor: Executor, there: There | None = None) -> dict[str, Any]:
    """The output with its manifest; returns the report."""
    started, opened = time.monotonic(), job.inputs
    report = {"method": job.method, "dialect": job.dialect}
    report |= {key: value for key, value in job.recipe().items() if key in ("parameters", "weights")}
    if job.output_kind == "full":
        found, base_hash, made = _write_full(job, scratch, steps, executor, there)
        opened.check_hash(base_hash)
    else:
        base_hash, made = opened.base_hash or content_hash(opened.base.path), None
        found = _write_part(job, scratch, steps, {"name": opened.base_name, "content_sha256": base_hash})
    opened.check_unchanged()
    report |= {**found, "seed": job.seed, "output_kind": job.output_kind, "wall_s": round(time.monotonic() - started, 3)}
    write_manifest(scratch, command="paft merge", recipe=job.recipe(), seed=job.seed, inputs=opened.described(), tensors=made,
                   base={"name": opened.base_name, "content_sha256": base_hash}, metrics=report)
    return report


def _write_full(job: Job, scratch: Path, steps: _Steps, executor: Executor,
                there: There | None) -> tuple[dict[str, Any], str, Tensors]:
    """A whole model; returns the report, the content hash of the base and the hashes of the model's tensors."""
    tallies = {name: Tally(job.inputs.names) for name in job.inputs.base.entries if name in job.touched}

    def merged(entry: Entry, read: Read) -> Iterator[torch.Tensor] | None:
        return job.merged(entry, read, tallies[entry.name]) if entry.name in job.touched else None

    key = key_of(job.recipe(), job.inputs.described(), job.inputs.base)
    shards = Shards.open(scratch, key, tallies, there and there.standing())
    if executor.spreads:
        written = write_files(job, scratch, tallies, steps, shards, executor, there)
    else:
        written = writer.write_tensors(job.inputs.base, scratch, job.dtype, merged, job.threads, steps, shards)
    writer.write_companions(job.inputs.base, scratch, job.dtype)
    title = f"{job.inputs.base_name} + {', '.join(job.inputs.names)} ({job.method})"
    card = model_card(title, base=job.inputs.base_name, recipe=job.recipe())
    (scratch / "README.md").write_text(card, encoding="utf-8")
    tally = Tally(job.inputs.names)
    for each in tallies.values():
        tally.add(each)
    count = {"merged": len(job.touched), "copied": len(job.inputs.base.entries) - len(job.touched)}
    report = {**tally.report(), "tensors": count, "bytes": {"read": written.read, "written": written.written}}
    return report, written.base_hash, written.out


def _write_part(job: Job, scratch: Path, steps: _Steps, origin: dict[str, Any]) -> dict[str, Any]:
    steps.total = len(job.touched)
    title = f"{' + '.join(job.inputs.names)} ({job.method})"
    report = write_output(
        job.output_kind, job.source(), scratch, title=title, recipe=job.recipe(), budget=job.budget, dtype=job.dtype,
        seed=job.seed, base=origin, progress=steps,
    )  # fmt: skip
    return {**report, "adapters": [{"name": name} for name in job.inputs.names]}


class _Steps:
    """Counts tensors and tells ``progress(done, total, name)``."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, name: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, name)


def _known(what: str, value: str, choices: Any) -> str:
    if value not in choices:
        raise UsageError(f"there is no {what} {value!r}", hint=did_you_mean(value, choices))
    return value
