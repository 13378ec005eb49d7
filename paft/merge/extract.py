"""What `paft delta` does: the delta of one adapter, fine-tuned model or delta file, as a delta file or as a LoRA."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from paft.delta import TILE_ELEMENTS, ProductTensor, Tiled
from paft.errors import UsageError, did_you_mean
from paft.merge.deltas import Pruned, Source
from paft.merge.inputs import Inputs, open_inputs
from paft.merge.merged import products
from paft.merge.ops import DIALECTS
from paft.merge.outputs import find_budget, fit_output, preview, write_output
from paft.merge.trim import Trim, trim
from paft.provenance import check_target, content_hash, output_dir, write_manifest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RULES = DIALECTS["peft"]  # exactly max(1, int(share·n)) entries of each tensor


@dataclass(frozen=True)
class Prune:
    """Which entries to keep: the ``largest`` share of each tensor by magnitude, or all from ``threshold`` on.

    Equal magnitudes are kept in index order. Raises UsageError for both at once, a share outside (0, 1], or a
    threshold that is not a positive number.
    """

    largest: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.largest is not None and self.threshold is not None:
            raise UsageError("--keep-largest and --threshold exclude each other", hint="give one of the two")
        if self.largest is not None and not 0 < self.largest <= 1:
            raise UsageError(f"the share to keep must be in (0, 1], not {self.largest}", hint="--keep-largest 0.1 keeps a tenth")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise UsageError(f"threshold {self.threshold} is not a positive number", hint="PAFT counts below --threshold 1e-5")

    def __bool__(self) -> bool:
        return self.largest is not None or self.threshold is not None

    def named(self) -> dict[str, float | None]:
        """What was asked for, under the name of its option."""
        return {"keep_largest": self.largest, "threshold": self.threshold}

    def __call__(self, tensor: Tiled) -> Tiled:
        """The tensor with the other entries set to zero; two passes over it find the k-th magnitude."""
        if self.threshold is not None:
            return Pruned(tensor, Trim(self.threshold))
        return tensor if self.largest is None else Pruned(tensor, trim(tensor, self.largest, _RULES))


def extract(
    name: str,
    *,
    base: str | None,
    out: Path,
    prune: Prune = Prune(),
    dtype: str | None = None,
    to_lora: bool = False,
    partial: bool = False,
    rank: int | None = None,
    max_error: float | None = None,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> dict[str, Any]:
    """Write the delta of one input into ``out`` and return a report; with ``dry_run`` what would be written.

    ``partial`` lets a LoRA leave out what it cannot hold. ``relative_error`` is ‖δ - written‖ / ‖δ‖. Raises UsageError
    for options that exclude each other, and what `open_inputs`, `write_delta` and `write_lora` raise; the target is
    then as it was.
    """
    check_target(out, overwrite=overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype!r}", hint=did_you_mean(dtype, DTYPES))
    if to_lora and prune:
        raise UsageError("pruning and --to-lora exclude each other", hint="an adapter is not sparse; give --rank or --max-error")
    if partial and not to_lora:
        raise UsageError("--partial is for --to-lora", hint="a delta file holds every tensor")
    kind, output_kind = DTYPES.get(dtype or ""), "lora" if to_lora else "delta"
    budget = find_budget(output_kind, rank, max_error, kind)
    opened = open_inputs([name], base, allow_base_mismatch=allow_base_mismatch)
    opened.check_apart(out)
    source = replace(_source(opened, prune, tile_elements), partial=partial)
    asked = {**prune.named(), "dtype": dtype, "to_lora": to_lora, "partial": partial, **(budget.named() if budget else {})}
    recipe = {"kind": "delta", "input": opened.names[0], "base": opened.base_name}
    recipe |= {key: value for key, value in asked.items() if value}
    found = preview(output_kind, source, budget, kind)
    if dry_run:
        return {"dry_run": True, "recipe": recipe, "tensors": found["tensors"], "bytes": {"written": found["written"]},
                "memory_bytes": found["memory"]}
    fit_output(out, found)
    options = {"recipe": recipe, "budget": budget, "dtype": kind, "seed": seed, "progress": _steps(progress, len(source.names))}
    with output_dir(out, overwrite=overwrite) as scratch:
        report = _write(output_kind, opened, source, scratch, options)
    return report | {"out": str(out)}


def _write(output_kind: str, opened: Inputs, source: Source, scratch: Path, options: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    origin = {"name": opened.base_name, "content_sha256": opened.base_hash or content_hash(opened.base.path)}
    report = write_output(output_kind, source, scratch, title=f"The delta of {opened.names[0]}", base=origin, **options)
    report |= {"output_kind": output_kind, "wall_s": round(time.monotonic() - started, 3)}
    opened.check_unchanged()
    inputs = [{"name": opened.names[0], "content_sha256": opened.deltas[0].content_hash}]
    recipe, seed = options["recipe"], options["seed"]
    write_manifest(scratch, command="paft delta", recipe=recipe, seed=seed, base=origin, inputs=inputs, metrics=report)
    return report


def _steps(progress: Callable[[int, int, str], None] | None, total: int) -> Callable[[str], None]:
    done = itertools.count(1)
    return lambda name: progress(next(done), total, name) if progress is not None else None


def _source(opened: Inputs, prune: Prune, elements: int) -> Source:
    delta = opened.deltas[0]

    def tensor(name: str) -> Tiled:
        return prune(delta.tensor(name, elements))

    def parts(name: str) -> list[ProductTensor] | None:
        return None if prune else products([delta.tensor(name, elements)])

    return Source(opened.base, opened.reference, opened.touched(), tensor, parts, opened.deltas, opened.adapters)
