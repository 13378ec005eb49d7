"""Deltas through a method into a model or an adapter, tensor by tensor in row tiles; never a second copy of the model.

For each tensor that a delta touches: the method makes a plan in passes over ΔW tiles; then each tile of W is read
once, and

    W' = round(W + D),   D = plan(ΔW_1, ..., ΔW_n)

is computed in float32 and rounded once. Where D is zero the base's bits stay. Everything else is copied undecoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paft.card import adapter_card, model_card
from paft.checkpoint import FLOATS, Entry
from paft.delta import TILE_ELEMENTS, BaseTensor, Tiled, ZeroTensor, tile_rows
from paft.errors import MismatchError, UsageError, did_you_mean
from paft.merge import methods, writer
from paft.merge.inputs import Inputs, open_inputs
from paft.merge.lora import write_lora
from paft.merge.ops import Plan
from paft.merge.profile import profile
from paft.merge.settings import Input, Settings, native
from paft.merge.tally import Tally
from paft.provenance import check_target, content_hash, output_dir, write_manifest

Progress = Callable[[int, int, str], None]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
OUTPUT_KINDS = ("full", "lora")
_COPY_RATE = 1e9  # bytes per second that a plain disk writes, for estimates
_IMPORTS = 400e6  # bytes of memory that Python with torch takes before any work


@dataclass(frozen=True)
class Job:
    """One merge with everything resolved: inputs opened, parameters complete, types known."""

    inputs: Inputs
    method: str
    settings: Settings
    dialect: str
    seed: int
    dtype: torch.dtype | None
    output_kind: str
    elements: int
    touched: frozenset[str] = field(init=False)
    reach: list[frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reach", [frozenset(delta.names) for delta in self.inputs.deltas])
        object.__setattr__(self, "touched", frozenset().union(*self.reach))

    def tensors(self, name: str) -> list[Tiled]:
        """One tensor's delta of every input, zero where an input does not touch it."""
        entry = self.inputs.base.entries[name]
        step = tile_rows(entry.columns, self.elements)
        return [
            delta.tensor(name, self.elements) if name in reach else ZeroTensor(entry.rows, entry.columns, step)
            for delta, reach in zip(self.inputs.deltas, self.reach, strict=True)
        ]

    def plan(self, name: str, tensors: Sequence[Tiled] | None = None) -> Plan:
        """How one tensor is merged; this is where a method makes its passes over ΔW."""
        entry = self.inputs.base.entries[name]
        base = BaseTensor(name, self.inputs.base, entry.rows, entry.columns, tile_rows(entry.columns, self.elements))
        weights, parameters = self.settings.at(name)
        function = methods.bind(self.method, parameters, dialect=self.dialect, seed=self.seed, base=base)
        return function(self.tensors(name) if tensors is None else tensors, weights)

    def check_parameters(self) -> None:
        """Let the method refuse values (a density of 2, three adapters for SLERP) before any tensor is read."""
        none = ZeroTensor(1, 1, 1)
        for name, weights, parameters in self.settings.distinct(self.inputs.touched()):
            function = methods.bind(self.method, parameters, dialect=self.dialect, seed=self.seed, base=none)
            try:
                function([none] * len(weights), weights)
            except UsageError as error:
                where = f"{name}: " if self.settings.varies else ""
                raise UsageError(where + error.message, hint=error.hint) from None

    def merged(self, entry: Entry, tally: Tally) -> Iterator[torch.Tensor]:
        """The merged row tiles of one tensor in the output type; raises MismatchError when the type overflows."""
        tensors = self.tensors(entry.name)
        plan = self.plan(entry.name, tensors)
        step = tile_rows(entry.columns, self.elements)
        for start in range(0, entry.rows, step):
            stop = min(start + step, entry.rows)
            tiles = [tensor.tile(start, stop) for tensor in tensors]
            parts = [keep(tile, start) for keep, tile in zip(plan.filters, tiles, strict=True)]
            delta = plan.combine(parts, start)
            weight = self.inputs.base.tile(entry.name, start, stop)
            wide = weight if weight.dtype == torch.float64 else weight.float()
            dtype = writer.output_dtype(entry, self.dtype)
            out = (wide + delta).to(dtype)
            zero = weight == 0
            if zero.any():  # W + 0 is W, byte for byte, but for the sign of -0.0
                out = torch.where(zero & (delta == 0), weight.to(dtype), out)
            if not torch.isfinite(out).all():
                raise MismatchError(f"{entry.name} does not fit into {dtype} after merging", hint="pass --dtype float32")
            tally.filtered(tiles, parts)
            tally.rounded(delta, out.to(wide.dtype) - wide)
            yield out

    def recipe(self) -> dict[str, Any]:
        """The merge as a recipe that says everything, for ``paft.json`` and the card."""
        return {
            "kind": "merge",
            "method": self.method,
            "dialect": self.dialect,
            **self.settings.record(self.inputs.names),
            "base": self.inputs.base_name,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "output_kind": self.output_kind,
            "seed": self.seed,
        }


def merge(
    inputs: Sequence[Input],
    *,
    base: str | None,
    method: str,
    parameters: dict[str, Any],
    weights: Sequence[float] | None,
    out: Path,
    dialect: str = "mergekit",
    dtype: str | None = None,
    seed: int = 0,
    output_kind: str = "full",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> dict[str, Any]:
    """Merge adapters or fine-tuned models into ``out`` and return a report; with ``dry_run`` the plan, writing nothing.

    ``inputs`` and ``base`` are paths or hub ids; ``base`` None is the one that the adapters name. An input may be
    ``{"adapter": PATH, "weight": V, ...}``; values may vary over the model (`paft.merge.settings`). ``weights`` is one
    number per input, 1 each by default. ``dtype`` None keeps the base's. ``tile_elements`` bounds the memory and
    changes no byte. Raises UsageError for wrong parameters, MismatchError for inputs that do not fit together or a
    target that is not empty, NotFoundError, ResourceError; the target is then as it was.
    """
    out = Path(out)
    check_target(out, overwrite=overwrite)
    settings = Settings.read(native(method, dialect), inputs, parameters, weights)
    _known("output kind", output_kind, OUTPUT_KINDS)
    kind = None if dtype is None else DTYPES[_known("dtype", dtype, DTYPES)]
    opened = open_inputs(settings.inputs, base)
    job = Job(opened, method, settings.over(opened.base.entries), dialect, seed, kind, output_kind, tile_elements)
    job.check_parameters()
    opened.check_apart(out)
    if dry_run:
        return _estimate(job)
    started = time.monotonic()
    steps = _Steps(progress, len(opened.base.entries))
    with output_dir(out, overwrite=overwrite) as scratch:
        report = {"method": method, "dialect": dialect, "seed": seed}
        report |= {key: value for key, value in job.recipe().items() if key in ("parameters", "weights")}
        report |= {"full": _write_full, "lora": _write_lora}[output_kind](job, scratch, steps)
        report |= {"output_kind": output_kind, "wall_s": round(time.monotonic() - started, 3)}
        hashes = [
            {"name": name, "content_sha256": delta.content_hash} for name, delta in zip(opened.names, opened.deltas, strict=True)
        ]
        origin = {"name": opened.base_name, "content_sha256": content_hash(opened.base.path)}
        write_manifest(scratch, command="paft merge", recipe=job.recipe(), seed=seed, base=origin, inputs=hashes, metrics=report)
    return report | {"out": str(out)}


def _write_full(job: Job, scratch: Path, steps: _Steps) -> dict[str, Any]:
    tally = Tally(job.inputs.names)

    def changed(entry: Entry) -> Iterator[torch.Tensor] | None:
        steps(entry.name)
        return job.merged(entry, tally) if entry.name in job.touched else None

    moved = writer.write_tensors(job.inputs.base, scratch, job.dtype, changed)
    writer.write_companions(job.inputs.base, scratch, job.dtype)
    title = f"{job.inputs.base_name} + {', '.join(job.inputs.names)} ({job.method})"
    card = model_card(title, base=job.inputs.base_name, recipe=job.recipe())
    (scratch / "README.md").write_text(card, encoding="utf-8")
    copied = len(job.inputs.base.entries) - len(job.touched)
    return {**tally.report(), "tensors": {"merged": len(job.touched), "copied": copied}, "bytes": moved}


def _write_lora(job: Job, scratch: Path, steps: _Steps) -> dict[str, Any]:
    steps.total = len(job.touched)
    report = write_lora(job.inputs, scratch, job.plan, steps)
    title = f"{' + '.join(job.inputs.names)} ({job.method})"
    card = adapter_card(title, base=job.inputs.base_name, recipe=job.recipe())
    (scratch / "README.md").write_text(card, encoding="utf-8")
    adapters = [{"name": name} for name in job.inputs.names]
    return {**report, "adapters": adapters, "tensors": {"merged": len(job.touched), "copied": 0}}


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


def _estimate(job: Job) -> dict[str, Any]:
    """What a merge would cost: the time of its middle-sized tensor, scaled by entries, plus the copying."""
    entries = job.inputs.base.entries
    changed = sorted((entries[name] for name in job.touched), key=lambda entry: entry.rows * entry.columns)
    size = sum(entry.rows * entry.columns for entry in changed)
    sample = changed[len(changed) // 2]
    started = time.monotonic()
    for _ in job.merged(sample, Tally(job.inputs.names)):
        pass
    rate = (time.monotonic() - started) / max(1, sample.rows * sample.columns)
    read = sum(entry.nbytes for entry in entries.values())
    written = sum(
        entry.rows * entry.columns * writer.output_dtype(entry, job.dtype).itemsize if entry.is_float else entry.nbytes
        for entry in entries.values()
    )
    factors = sum(f.A.nbytes + f.B.nbytes for adapter in job.inputs.adapters for f in adapter.factors.values())
    tile = max((tile_rows(entry.columns, job.elements) * entry.columns for entry in changed), default=0)
    return {
        "dry_run": True,
        "recipe": job.recipe(),
        "tensors": {"merged": len(changed), "copied": len(entries) - len(changed)},
        "bytes": {"read": read, "written": written},
        "seconds": round(rate * size + written / _COPY_RATE, 2),
        "profile": profile(job.settings, job.inputs.touched(), job.inputs.names),
        "memory_bytes": int(_IMPORTS + factors + tile * 4 * (4 * len(job.inputs.deltas) + 12)),
    }
