"""The pipeline: two data sets in; adapters, merged models and one table out.

    data ──> train (each adapter once) ──> merge ──> evaluate ──> report.json, report.md, figures
                └──> train on top of another (sequential) ──────────┘

Every stage is a directory under the run's own, complete or absent. With ``resume`` a stage whose recipe, seed, base and data have
the hashes that its `paft.json` records is kept; anything else is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from paft import data, provenance
from paft.adapter import read_adapter
from paft.controls import pruned, rescaled
from paft.errors import UsageError
from paft.evaluate import Evaluator, Held, judge_of
from paft.executor import LOCAL, Ask, Executor
from paft.merge.engine import merge
from paft.models import free_cores, load_model, load_tokenizer, resolve_base, wrap
from paft.parallel import gpus
from paft.preflight import check_disk
from paft.progress import Progress, say
from paft.recipe import DpoRecipe, RunRecipe, Splits
from paft.report.headtohead import write_report
from paft.report.sparsity import sparsity
from paft.runplan import check, stage_recipe
from paft.sections import Resources
from paft.train import losses
from paft.train.interleave import Seat, Turn, interleave
from paft.train.reference import named_hash
from paft.train.stage import costs, start_model, train
from paft.train.work import PLACES

Rows = dict[str, list[data.Row]]


@dataclass
class Run:
    """One run in one directory: its recipe, its rows, and what it has measured so far."""

    recipe: RunRecipe
    out: Path
    quiet: bool = False
    sft: Rows = field(default_factory=dict)
    pref: Rows = field(default_factory=dict)
    text: list[data.Row] = field(default_factory=list)
    base_hash: str = ""
    workers: int | None = 1
    share_base: bool = False
    resume: bool = False
    executor: Executor = LOCAL

    def adapter(self, name: str) -> Path:
        return self.out / "adapters" / name

    def merged(self, name: str) -> Path:
        return self.out / "merges" / name


def run(recipe: RunRecipe, out: Path, *, overwrite: bool = False, resume: bool = False, quiet: bool = False,
        workers: int | None = None, share_base: bool = False, executor: Executor = LOCAL) -> dict[str, Any]:
    """Execute ``recipe`` under ``out`` and return the report (also written as report.json); see the module's docstring.

    ``workers``: how many trainings run side by side; None is one a GPU; on a CPU one a core, or one for a base from 100 MB up.
    ``share_base``: in this process, what starts from the base takes turns over one copy of it, with the same results.
    ``executor``: where stages run (`paft.executor`); on Ray as many as the cluster has room for, and ``out`` is on a shared disk.
    Raises UsageError for a recipe that names unknown stages, MismatchError for a target that is not empty.
    """
    if share_base and (workers or 1) > 1:
        raise UsageError("--share-base is one process, --workers several", hint="pass one of them")
    if share_base and executor.spreads:
        raise UsageError("--share-base is one process, --executor ray several", hint="pass one of them")
    check(recipe)
    executor.join()
    if not resume:
        provenance.check_target(out, overwrite=overwrite, in_place=True)
    workers = 1 if share_base else workers or (None if executor.spreads else _default_workers(recipe))
    job = Run(recipe, out, quiet, workers=workers, resume=resume or executor.spreads, share_base=share_base, executor=executor)
    started = time.monotonic()
    _read_data(job)
    check_disk(out, sum(_base_size(recipe) for name in recipe.merge if not job.merged(name).exists()))
    with provenance.claim(Path(os.path.realpath(out))), provenance.set_aside(out, aside=overwrite and not resume):
        return _execute(job, started)


def _default_workers(recipe: RunRecipe) -> int:
    """A training fills a GPU; a small model cannot use two cores for one training, but two trainings can."""
    size = _base_size(recipe)
    return len(gpus()) or (free_cores() if size < 100e6 else 1)


def _base_size(recipe: RunRecipe) -> int:
    return sum(file.stat().st_size for file in provenance.tensor_files(resolve_base(recipe.model)))


def _execute(job: Run, started: float) -> dict[str, Any]:
    recipe, out = job.recipe, job.out
    out.mkdir(parents=True, exist_ok=True)
    _train_all(job)
    _placed(job, "merge", _merge_all)
    scores = _placed(job, "evaluate", _evaluate_all)
    provenance.write_manifest(out, command="run", recipe=recipe.model_dump(), seed=recipe.seed,
                              base={"name": recipe.model, "content_sha256": job.base_hash},
                              inputs={"sft": data.content_hash(job.sft["train"]), "pref": data.content_hash(job.pref["train"])},
                              wall_s=round(time.monotonic() - started, 1))
    return write_report(out, recipe, scores, {name: sparsity(read_adapter(job.adapter(name))) for name in recipe.train},
                        wall_s=round(time.monotonic() - started, 1))


def plan(recipe: RunRecipe, out: Path, *, workers: int | None = None) -> dict[str, Any]:
    """What `run` would do: stages, rows, disk, and seconds and memory of the trainings; nothing is written, no model is loaded.

    ``seconds`` are those of the trainings that are not there yet, side by side as ``workers`` allow; a sequence takes longer.
    """
    check(recipe)
    job = Run(recipe, out, quiet=True)
    _read_data(job)
    stages, workers = [], workers or _default_workers(recipe)
    for name, stage in recipe.train.items():
        alone = stage_recipe(recipe, name, out).model_copy(update={"on": None})
        cost = costs(alone, losses.shaped(alone, _rows(job, stage.objective)) if isinstance(alone, DpoRecipe)
                     else _rows(job, stage.objective), quiet=True)
        stages.append({"name": name, "on": stage.on, "done": _is_done(job, name), "seconds": cost["seconds"],
                       "memory_bytes": cost["memory_bytes"]})
    left = [stage["seconds"] for stage in stages if not stage["done"]]
    size = _base_size(recipe)
    return {"out": str(out), "model": recipe.model, "base_bytes": size, "disk_bytes": size * len(recipe.merge),
            "rows": {"sft": {k: len(v) for k, v in job.sft.items()}, "pref": {k: len(v) for k, v in job.pref.items()}},
            "train": stages, "workers": workers, "seconds": round(max([sum(left) / workers, *left], default=0.0), 1),
            "memory_bytes": sum(sorted((stage["memory_bytes"] for stage in stages), reverse=True)[:workers]),
            "merge": list(recipe.merge), "evaluate": 1 + len(recipe.train) + len(recipe.merge)}


def _read_data(job: Run) -> None:
    spec = job.recipe.data
    how = data.Reading(on_bad_row=job.recipe.on_bad_row, seed=job.recipe.seed,
                       note=lambda line: say(f"note: {line}", quiet=job.quiet))
    job.sft, job.pref = data.splits(spec.sft, "sft", how=how), data.splits(spec.pref, "pref", how=how)
    if spec.text:
        split = job.recipe.evaluate.split
        job.text = data.load_rows(spec.text, "text", split if spec.text.startswith("demo:") else None)
    job.base_hash = provenance.content_hash(resolve_base(job.recipe.model))


def _rows(job: Run, objective: str) -> Rows:
    if objective == "joint":
        return {"sft": job.sft["train"], "pref": job.pref["train"]}
    return {"train": (job.pref if objective == "dpo" else job.sft)["train"], "eval": []}


def _is_done(job: Run, name: str) -> bool:
    """Whether the adapter of a stage stands there, made from the same recipe, base, data and predecessor."""
    manifest = provenance.read_manifest(job.adapter(name))
    if manifest is None:
        return False
    stage = stage_recipe(job.recipe, name, job.out)
    same = _portable(manifest["recipe"]) == _portable(json.loads(json.dumps(stage.model_dump())))
    rows = {key: data.content_hash(found) for key, found in _rows(job, job.recipe.train[name].objective).items() if found}
    before = provenance.read_manifest(Path(stage.on)) if stage.on else None
    on = manifest["base"].get("on", {}).get("content_sha256")
    named = named_hash(stage) if isinstance(stage, DpoRecipe) else None
    same = same and named in (None, (manifest.get("reference") or {}).get("content_sha256"))
    return (same and manifest["inputs"] == rows and manifest["base"]["content_sha256"] == job.base_hash
            and on == (before or {}).get("content_sha256") and not provenance.verify(job.adapter(name)))


def _portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the paths that only say where things lie; their content is compared by hash."""
    return {key: value for key, value in recipe.items() if key not in PLACES}


def _train_all(job: Run) -> None:
    needs: dict[str, str | None] = {}
    for name, stage in job.recipe.train.items():
        if _is_done(job, name) and stage.on not in needs:
            say(f"  {name:<14} kept", quiet=job.quiet)
        else:
            needs[name] = stage.on
    started, made = time.monotonic(), []

    def done(name: str, manifest: dict[str, Any]) -> None:
        made.append(name)
        left = (time.monotonic() - started) / len(made) * (len(needs) - len(made))
        say(f"  {name:<14} {manifest['wall_s']:4.0f} s   loss {manifest['metrics'].get('task_loss', float('nan')):.3f}   "
            f"{len(made)}/{len(needs)}" + (f", about {_minutes(left)} of training left" if left else ""), quiet=job.quiet)

    if job.share_base:
        for name, manifest in _train_together(job, [name for name, on in needs.items() if on is None]).items():
            del needs[name]
            done(name, manifest)
    asks = {name: _ask(job, job.recipe.train[name].resources) for name in needs}
    job.executor.graph(needs, partial(_train_one, _there(job)), workers=job.workers and min(job.workers, max(1, len(needs))),
                       done=done, room=job.out, asks=asks)


def _ask(job: Run, said: Resources | None = None) -> Ask:
    """What a stage asks for: by default enough for the base, and what its ``resources`` say."""
    return replace(job.executor.ask(_base_size(job.recipe)), **(said.model_dump(exclude_none=True) if said else {}))


def _there(job: Run) -> Run:
    """The run as a stage elsewhere sees it: alone, with a log of its own to write to."""
    return replace(job, quiet=False, workers=1, executor=LOCAL) if job.executor.spreads else job


def _placed(job: Run, name: str, stage: Callable[[Run], Any]) -> Any:
    """A stage that needs all those before it, where the executor puts it."""
    found: dict[str, Any] = {}
    job.executor.graph({name: None}, partial(_call, stage, _there(job)), workers=1, done=found.__setitem__, room=job.out,
                       asks={name: _ask(job)})
    return found[name]


def _call(stage: Callable[[Run], Any], job: Run, name: str) -> Any:
    return stage(job)


def _train_one(job: Run, name: str, seat: Seat | None = None) -> dict[str, Any]:
    objective = job.recipe.train[name].objective
    return train(stage_recipe(job.recipe, name, job.out), job.adapter(name), rows=_rows(job, objective), overwrite=True,
                 resume=job.resume, quiet=job.quiet or job.workers != 1, label=name, seat=seat)


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


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _merge_all(job: Run) -> None:
    store = job.out / "merges.json"
    keys = json.loads(store.read_text()) if store.is_file() else {}
    norm, density = cache(rescaled), cache(pruned)  # several merges take the same control
    with Progress("merge", len(job.recipe.merge), quiet=job.quiet) as show:
        for done, (name, entry) in enumerate(job.recipe.merge.items(), 1):
            sources = [job.adapter(source) for source in entry.of]
            if entry.norm_like:
                sources[0] = norm(sources[0], job.adapter(entry.norm_like), job.out / "rescaled")
            if entry.density_like:
                like = job.adapter(entry.density_like)
                sources[0] = density(job.adapter(entry.of[0]), like, job.out / "rescaled", base=job.recipe.model)
            key = _key([entry.method, entry.parameters, entry.weights, job.recipe.merge_dtype, job.recipe.seed, job.base_hash],
                       *map(provenance.content_hash, sources))
            if not (keys.get(name) == key and job.merged(name).is_dir() and not provenance.verify(job.merged(name))):
                merge([str(source) for source in sources], base=job.recipe.model, method=entry.method,
                      parameters=entry.parameters,
                      weights=entry.weights, out=job.merged(name), dtype=job.recipe.merge_dtype, seed=job.recipe.seed,
                      overwrite=True)
                keys[name] = key
                store.write_text(json.dumps(keys, indent=1))
            show(done, name)


def _evaluate_all(job: Run) -> dict[str, dict[str, float]]:
    """Scores of every candidate on the recipe's split; those in scores.json with the same content are not computed again."""
    recipe, said = job.recipe, job.recipe.evaluate
    held = Held(job.sft[said.split], job.pref[said.split], job.text).head(said.rows)
    store = job.out / "scores.json"
    known = json.loads(store.read_text()) if store.is_file() else {}
    beta, pref = recipe.defaults.dpo.beta, recipe.data.pref
    source = (getattr(pref, said.split) or pref.train) if isinstance(pref, Splits) else pref
    context = [said.model_dump(), beta, job.base_hash, *map(data.content_hash, vars(held).values())]
    keys = {name: _key(context, provenance.content_hash(path)) for name, path in _candidates(job).items()}
    if not known.keys() >= set(keys.values()):
        base = load_model(recipe.model)
        tokenizer = load_tokenizer(recipe.model, chat=isinstance(held.sft[0].get("prompt"), list), template=recipe.chat_template)
        score = Evaluator(tokenizer, held, None, beta, said.batch_size, said.generate, judge_of(source)).against(base)
        with Progress("evaluate", len(keys), quiet=job.quiet) as show:
            for done, (name, key) in enumerate(keys.items(), 1):
                if key not in known:
                    known[key] = score(_load(job, name, base))
                    store.write_text(json.dumps({key: known[key] for key in keys.values() if key in known}, indent=1))
                show(done, name)
    return {name: known[key] for name, key in keys.items()}


def _key(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _candidates(job: Run) -> dict[str, Path]:
    """Everything the table has a row for: the base, then every adapter, then every merged model."""
    return {"base": resolve_base(job.recipe.model), **{name: job.adapter(name) for name in job.recipe.train},
            **{name: job.merged(name) for name in job.recipe.merge}}


def _load(job: Run, name: str, base: Any) -> Any:
    if name == "base":
        return base
    if name in job.recipe.train:
        return wrap(load_model(job.recipe.model), job.adapter(name))
    return load_model(str(job.merged(name)))
