"""The pipeline: two data sets in; adapters, merged models and one table out.

    data ──> train (each adapter once) ──> merge ──> evaluate ──> report.json, report.md, figures
                └──> train on top of another (sequential) ──────────┘

Every stage is a directory under the run's own, complete or absent. With ``resume`` a stage whose recipe, seed, base and data have
the hashes that its `paft.json` records is kept; anything else is made again.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from paft import data, provenance
from paft.adapter import read_adapter
from paft.errors import UsageError
from paft.executor import LOCAL, SMALL, Executor
from paft.models import free_cores
from paft.parallel import gpus
from paft.preflight import check_disk
from paft.progress import duration, say
from paft.recipe import RunRecipe
from paft.report.headtohead import write_report
from paft.report.sparsity import sparsity
from paft.runcosts import foretell
from paft.runeval import evaluate_all
from paft.runjob import Run, base_size
from paft.runmerge import merge_all
from paft.runplan import check, stage_recipe, tasks_of
from paft.runstore import ADAPTERS, MERGES, check_free, clear, fetch, publish, staged
from paft.store import Store, check_sole, sole
from paft.tasks import Harness
from paft.train.interleave import Seat, Turn, interleave
from paft.train.stage import start_model, train
from paft.train.work import place


def run(recipe: RunRecipe, out: Path | Store, *, overwrite: bool = False, resume: bool = False, quiet: bool = False,
        workers: int | None = None, share_base: bool = False, executor: Executor = LOCAL) -> dict[str, Any]:
    """Execute ``recipe`` under ``out`` and return the report (also written as report.json); see the module's docstring.

    ``workers``: how many trainings run side by side; None is one a GPU; on a CPU one a core, or one for a base from 100 MB up.
    ``share_base``: in this process, what starts from the base takes turns over one copy of it, with the same results.
    ``executor``: where stages run (`paft.executor`); on Ray as many as the cluster has room for, and ``out`` is on a shared disk,
    or a `Store` (`paft.runstore`).
    Raises UsageError for a recipe that names unknown stages, what `paft.tasks.Harness` raises for tasks that cannot be asked, and
    MismatchError for a target that is not empty, all before anything is trained.
    """
    if share_base and (workers or 1) > 1:
        raise UsageError("--share-base is one process, --workers several", hint="pass one of them")
    if share_base and executor.spreads:
        raise UsageError("--share-base is one process, --executor ray several", hint="pass one of them")
    check(recipe)
    harness = tasks_of(recipe)
    executor.join()
    if not resume:
        check_free(out, overwrite=overwrite)
    store, out = (out, out.here) if isinstance(out, Store) else (None, out)
    workers = 1 if share_base else workers or (0 if executor.spreads else _default_workers(recipe))
    job = Run(recipe, out, quiet, workers=workers, resume=resume or executor.spreads, share_base=share_base, executor=executor,
              store=store)
    started = time.monotonic()
    job.read()
    check_disk(out, sum(base_size(recipe) for name in recipe.merge if not job.merged(name).exists()))
    with (provenance.claim(Path(os.path.realpath(out))), sole(store.bucket, quiet=quiet) if store else nullcontext(),
          provenance.set_aside(out, aside=overwrite and not resume and not store)):
        if store and not resume:
            check_free(store, overwrite=overwrite)  # it may have been made since
            clear(store)
        return _execute(job, harness, started)


def _default_workers(recipe: RunRecipe) -> int:
    """A training fills a GPU; a small model cannot use two cores for one training, but two trainings can."""
    size = base_size(recipe)
    return len(gpus()) or (free_cores() if size < SMALL else 1)


def _execute(job: Run, harness: Harness | None, started: float) -> dict[str, Any]:
    recipe, out = job.recipe, job.out
    out.mkdir(parents=True, exist_ok=True)
    provenance.sweep(out)
    fetch(job)
    _train_all(job)
    merge_all(job)
    scores = _evaluate(job, harness)
    provenance.write_manifest(out, command="run", recipe=recipe.model_dump(), seed=recipe.seed,
                              base={"name": recipe.model, "content_sha256": job.base_hash},
                              inputs={"sft": data.content_hash(job.sft["train"]), "pref": data.content_hash(job.pref["train"])},
                              wall_s=round(time.monotonic() - started, 1))
    report = write_report(out, recipe, scores, {name: sparsity(read_adapter(job.adapter(name))) for name in recipe.train},
                          wall_s=round(time.monotonic() - started, 1))
    if job.store:
        check_sole(job.store.bucket)
    publish(job)
    return report


def plan(recipe: RunRecipe, out: Path | Store, *, workers: int | None = None, executor: Executor = LOCAL) -> dict[str, Any]:
    """What `run` would do: stages, rows, disk, and seconds and memory (`paft.runcosts`); nothing is written, no model is loaded.

    ``seconds`` are those of the trainings that are not there yet, side by side as ``workers`` allow, or a cluster has room for;
    a sequence takes longer. Of a run behind a URL what is finished comes into the cache. ResourceError as `run`.
    """
    check(recipe)
    harness = tasks_of(recipe)
    executor.join()
    store, here = (out, out.here) if isinstance(out, Store) else (None, out)
    room = executor.room_for(base_size(recipe)) if executor.spreads else _default_workers(recipe)
    job = Run(recipe, here, quiet=True, workers=workers or room, executor=executor, store=store)
    job.read()
    fetch(job, weights=False)
    found: dict[str, Any] = foretell(job, harness) | {"out": str(out), "executor": executor.name}
    if executor.spreads:
        asks = job.asks([stage["name"] for stage in found["train"] if not stage["done"]])
        executor.check(asks)
        found["asks"] = {name: vars(ask) for name, ask in asks.items()}
    return found


def _train_all(job: Run) -> None:
    needs: dict[str, str | None] = {}
    for name, stage in job.recipe.train.items():
        if job.is_done(name) and stage.on not in needs:
            say(f"  {name:<14} kept", quiet=job.quiet)
        else:
            needs[name] = stage.on
    started, made = time.monotonic(), []

    def done(name: str, manifest: dict[str, Any]) -> None:
        made.append(name)
        fetch(job, f"{ADAPTERS}/{name}")
        left = (time.monotonic() - started) / len(made) * (len(needs) - len(made))
        say(f"  {name:<14} {manifest['wall_s']:4.0f} s   loss {manifest['metrics'].get('task_loss', float('nan')):.3f}   "
            f"{len(made)}/{len(needs)}" + (f", {duration(left)} of training left" if left else ""), quiet=job.quiet)

    if job.share_base:
        for name, manifest in _train_together(job, [name for name, on in needs.items() if on is None]).items():
            del needs[name]
            done(name, manifest)
    job.executor.check(asks := job.asks(needs))
    job.executor.graph(needs, staged(job, _train_one, ADAPTERS, makes=ADAPTERS), workers=min(job.workers, max(1, len(needs))),
                       done=done, room=job.room, asks=asks)


def _evaluate(job: Run, harness: Harness | None) -> dict[str, Any]:
    """`evaluate_all`, where the executor puts it."""
    found: dict[str, dict[str, Any]] = {}
    work = staged(job, partial(_evaluate_there, harness), ADAPTERS, MERGES, makes="")
    job.executor.graph({"evaluate": None}, work, workers=1, done=found.__setitem__, room=job.room, asks=job.asks())
    return found["evaluate"]


def _evaluate_there(harness: Harness | None, job: Run, name: str) -> dict[str, Any]:
    return evaluate_all(job, harness)


def _train_one(job: Run, name: str, seat: Seat | None = None) -> dict[str, Any]:
    begun = place(job.adapter(name)).is_dir()
    return train(stage_recipe(job.recipe, name, job.out), job.adapter(name), rows=job.rows(job.recipe.train[name].objective),
                 overwrite=True, resume=job.resume and begun, quiet=job.quiet or job.workers != 1, label=name, seat=seat)


def _train_seated(job: Run, name: str, base: Any, turn: Turn) -> dict[str, Any]:
    return _train_one(job, name, Seat(base, turn))


def _train_together(job: Run, names: list[str]) -> dict[str, dict[str, Any]]:
    """The trainings that can adapt one frozen copy of the base do so in turns; the others are left for later."""
    stages = {name: stage_recipe(job.recipe, name, job.out) for name in names}
    groups: dict[Any, list[str]] = {}
    for name, stage in stages.items():
        if not stage.full:  # a whole model is nobody's frozen base
            groups.setdefault((stage.dtype, stage.quantize), []).append(name)
    found: dict[str, dict[str, Any]] = {}
    for group in groups.values():
        base = start_model(stages[group[0]])
        found |= dict(zip(group, interleave([partial(_train_seated, job, name, base) for name in group]), strict=True))
    return found
