"""The outputs that are no whole model: an adapter or a delta file, with its card, from any `Source`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paft.card import adapter_card, delta_card
from paft.errors import UsageError
from paft.merge.deltas import Source, write_delta
from paft.merge.lora import check_lora, write_lora
from paft.merge.lowrank import Budget
from paft.preflight import check_disk, check_memory

Progress = Callable[[str], None]
_USE = """A delta: what a merge or a training adds to the base, without the base. It is no model and no PEFT adapter:
`paft merge THIS_DIRECTORY --method task_arithmetic -o OUT` makes the model."""


def find_budget(output_kind: str, rank: int | None, max_error: float | None, dtype: torch.dtype | None) -> Budget | None:
    """The options of an output, checked; raises UsageError for values out of range, or that the output does not have."""
    given = rank is not None or max_error is not None
    if output_kind == "lora" and dtype not in (None, torch.float32):
        raise UsageError("an adapter is written in float32", hint="leave out the dtype; it says how a model is stored")
    if output_kind == "delta" and dtype == torch.float64:
        raise UsageError("a delta file holds float32, bfloat16 or float16", hint="deltas are computed in float32")
    if output_kind != "lora" and given:
        raise UsageError("--rank and --max-error are for an adapter", hint="add --output-kind lora, or leave them out")
    return Budget(rank, max_error) if given else None


def write_output(
    output_kind: str,
    source: Source,
    out: Path,
    *,
    title: str,
    recipe: dict[str, Any],
    budget: Budget | None,
    dtype: torch.dtype | None,
    seed: int,
    base: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Write an adapter (``lora``) or a delta file (``delta``) with its card into ``out``; returns the report.

    ``base`` is the base's name and content hash, as the manifest has them. Raises as `write_lora` and `write_delta`.
    """
    if output_kind == "lora":
        report = write_lora(source, out, budget=budget, seed=seed, progress=progress)
        card = adapter_card(title, base=base["name"], recipe=recipe, text=lora_sentence(report))
    else:
        report = write_delta(source, out, dtype=dtype, base_hash=base["content_sha256"], progress=progress)
        card = delta_card(title, base=base["name"], recipe=recipe, text=f"{_USE}\n\n{delta_sentence(report)}")
    (out / "README.md").write_text(card, encoding="utf-8")
    return report


def preview(output_kind: str, source: Source, budget: Budget | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """What these outputs take: ``tensors``, bytes ``written`` at most and at ``least``, bytes of ``memory``.

    Refuses what the run would. What a sparse tensor takes only the writing tells; it may be nothing.
    """
    names = list(check_lora(source, budget)) if output_kind == "lora" else source.names
    itemsize = (dtype or torch.float32).itemsize
    written, least, memory = 0, 0, 0
    for name in names:
        entry, parts = source.base.entries[name], source.products(name)
        full, sides = min(entry.rows, entry.columns), entry.rows + entry.columns
        rank = full if parts is None else sum(each.left.shape[1] for each in parts)
        if budget is not None:
            rank = min(rank, budget.rank or rank)
        most, dense = 4 * rank * sides, entry.rows * entry.columns * itemsize
        if output_kind == "lora":
            known = budget is None or budget.rank is not None
        else:
            known, most = parts is not None and most < dense, min(most, dense)
        written, least = written + most, least + most * known
        direct = parts is not None or output_kind == "delta"
        memory = max(memory, 4 * rank * sides if parts is not None else 0 if direct else 16 * min(rank, full) * sides)
    return {"tensors": {"merged": len(names), "copied": 0}, "written": written, "least": least, "memory": memory}


def fit_output(out: Path, found: dict[str, Any]) -> None:
    """ResourceError where disk or memory cannot suffice for what `preview` ``found``."""
    check_disk(out, found["least"])
    check_memory(f"to make {out}", found["memory"], "give a smaller --rank, or end other programs")


def lora_sentence(report: dict[str, Any]) -> str:
    """The error of an adapter in one sentence."""
    if report["exact"]:
        return "Exact: the adapter is the delta, up to float32."
    name, worst = max(report["modules"].items(), key=lambda item: item[1]["relative_error"])
    sentence = f"Relative error {report['relative_error']:.3g}; at most {worst['relative_error']:.3g}, in\n{name}."
    if rest := report["left_out"]:
        sentence += f"\nLeft out, and in the error: {len(rest)} tensors that LoRA cannot hold, such as\n{rest[0]}."
    return sentence


def delta_sentence(report: dict[str, Any]) -> str:
    """What a delta file kept, in one sentence."""
    kept = f"{report['kept_share']:.1%} of the changed entries"
    error = report["relative_error"]
    return f"Keeps {kept}, " + (f"relative error {error:.3g}." if error else "exactly.")
