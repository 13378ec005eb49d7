"""What a run would cost, for a dry run: time, memory and disk of its stages, right to a factor of two or so.

    training     `paft.train.forecast`, and `evaluate.trajectory` + 1 evaluations of what is joint
    merge        4 passes over the base's bytes (read, write, hash twice) and 8 over each delta's entries, at measured speed
    evaluation   2 FLOP a token and parameter for what is read: held-out rows, prompts of tasks; each token that is written takes
                 a step of its own, of as many rows as go together, and answers end before their limit: that is an upper bound
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence, Set
from itertools import islice
from typing import Any

from paft import data
from paft.evaluate import Held
from paft.models import load_tokenizer, parameters, resolve_base
from paft.recipe import DpoRecipe, RunMerge
from paft.runeval import asked, held_of, known, tasks_of
from paft.runjob import Run, base_size
from paft.runplan import stage_recipe
from paft.tasks import Harness
from paft.tokens import encode
from paft.train import forecast, losses
from paft.train.stage import costs

DISK_RATE = 1e9  # bytes a second
PASSES = {"bytes": 4, "entries": 8}
MERGE = 0.3  # seconds of a merge of nothing: files, cards, manifests
SIDES = {"sft": ("completion",), "pref": ("chosen", "rejected"), "text": ("completion",)}


def foretell(job: Run, harness: Harness | None) -> dict[str, Any]:
    """The plan of a run that has read its data; what is there already costs nothing."""
    recipe, way, size = job.recipe, _trajectory(job), base_size(job.recipe)
    stages = [_stage(job, name, way) for name in recipe.train]
    there = {"base", *(stage["name"] for stage in stages if stage["done"])}
    there |= {name for name, entry in recipe.merge.items() if job.merged(name).is_dir() and _needs(entry) <= there}
    left = [stage["seconds"] for stage in stages if not stage["done"]]
    merges = [entry for name, entry in recipe.merge.items() if name not in there]
    return {"out": str(job.out), "model": recipe.model, "base_bytes": size, "disk_bytes": size * len(recipe.merge),
            "rows": {"sft": {k: len(v) for k, v in job.sft.items()}, "pref": {k: len(v) for k, v in job.pref.items()}},
            "train": stages, "workers": job.workers,
            "seconds": round(max([sum(left) / job.workers, *left], default=0.0), 1),
            "memory_bytes": sum(sorted((stage["memory_bytes"] for stage in stages), reverse=True)[:job.workers]),
            "merge": list(recipe.merge), "merge_seconds": round(_merging(job, merges), 1),
            "evaluate": len(job.candidates()), "evaluate_seconds": round(_evaluating(job, harness, there), 1)}


def _needs(entry: RunMerge) -> set[str]:
    return {*entry.of, *filter(None, (entry.density_like, entry.norm_like))}


def _stage(job: Run, name: str, way: float) -> dict[str, Any]:
    stage = job.recipe.train[name]
    alone, rows = stage_recipe(job.recipe, name, job.out).model_copy(update={"on": None}), job.rows(stage.objective)
    cost = costs(alone, losses.shaped(alone, rows) if isinstance(alone, DpoRecipe) else rows, quiet=True)
    seconds = cost["seconds"] + (way if stage.objective == "joint" else 0.0)
    return {"name": name, "on": stage.on, "done": job.is_done(name), "seconds": round(seconds, 1),
            "memory_bytes": cost["memory_bytes"]}


def _trajectory(job: Run) -> float:
    """Seconds of the evaluations on the way of a joint training."""
    if not (count := job.recipe.evaluate.trajectory):
        return 0.0
    rows = job.rows("joint")
    held, pairs, tokenizer = Held(rows["sft_eval"], rows["pref_eval"], []), Held([], rows["pref_eval"], []), _tokenizer(job)
    read = (count + 1) * _tokens(tokenizer, held) + _tokens(tokenizer, pairs)
    return forecast.answering(resolve_base(job.recipe.model), read, 0, 0)


def _merging(job: Run, merges: Sequence[RunMerge]) -> float:
    entries, size = parameters(resolve_base(job.recipe.model)), base_size(job.recipe)
    deltas = sum(len(entry.of) + bool(entry.density_like) + bool(entry.norm_like) for entry in merges)
    read = PASSES["bytes"] * size / DISK_RATE
    return len(merges) * (MERGE + read) + deltas * PASSES["entries"] * entries * _pass() if merges else 0.0


def _pass(entries: int = 1 << 22) -> float:
    """Seconds an entry of a pass over float32 numbers in memory."""
    import torch

    tensor, best = torch.ones(entries), float("inf")
    for _ in range(4):
        started = time.perf_counter()
        tensor.mul_(1.0)
        best = min(best, time.perf_counter() - started)
    return best / entries


def _evaluating(job: Run, harness: Harness | None, there: Set[str]) -> float:
    """Seconds of all that is not in scores.json, where only the rows that are ``there`` can be."""
    said, held, have, rows = job.recipe.evaluate, held_of(job), known(job), list(job.candidates())
    left = {name: [None, *tasks_of(job, harness, name)] for name in rows}
    left |= {name: [task for key, task in keys.items() if key not in have]
             for name, keys in asked(job, harness, [name for name in rows if name in there]).items()}
    measured = sum(None in tasks for tasks in left.values())
    asks = sum(len(tasks) - (None in tasks) for tasks in left.values()) / max(1, len(harness.tasks) if harness else 0)
    tokenizer = _tokenizer(job)
    read, written = harness.work(tokenizer) if harness and asks else (0.0, 0.0)
    prompts = sum("prompt" in row for row in [*held.sft, *held.pref]) * bool(said.generate)
    steps = measured * said.generate * math.ceil(prompts / (4 * said.batch_size)) + asks * written / said.batch_size
    reference = _tokens(tokenizer, Held([], held.pref, [])) * bool(measured)
    return forecast.answering(resolve_base(job.recipe.model), measured * _tokens(tokenizer, held) + reference + asks * read,
                              measured * prompts * said.generate + asks * written, steps)


def _tokenizer(job: Run) -> Any:
    chat = any(isinstance(row.get("prompt"), list) for row in job.sft["train"][:1])
    return load_tokenizer(job.recipe.model, chat=chat, template=job.recipe.chat_template)


def _tokens(tokenizer: Any, held: Held) -> float:
    """Of all held-out rows, by the mean of the first ones."""
    return sum(len(rows) * _mean(tokenizer, rows, SIDES[kind]) for kind, rows in vars(held).items() if rows)


def _mean(tokenizer: Any, rows: Sequence[data.Row], sides: Sequence[str]) -> float:
    head = list(islice(rows, forecast.HEAD))
    return sum(len(encode(tokenizer, row, side)[0]) for row in head for side in sides) / len(head)
