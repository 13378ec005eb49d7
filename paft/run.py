"""The pipeline: two data sets in; adapters, merged models and one table out.

    data ──> train (each adapter once) ──> merge ──> evaluate ──> report.json, report.md, figures
                └──> train on top of another (sequential) ──────────┘

Every stage is a directory under the run's own, complete or absent. With ``resume`` a stage whose recipe, seed, base and data have
the hashes that its `paft.json` records is kept; anything else is made again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paft import data, provenance
from paft.adapter import read_adapter
from paft.errors import UsageError, did_you_mean
from paft.evaluate import Evaluator, Held
from paft.merge.engine import merge
from paft.models import load_model, load_tokenizer, resolve_base, wrap
from paft.progress import Progress, say
from paft.recipe import DpoRecipe, JointRecipe, RunMerge, RunRecipe, SftRecipe, Splits, validate
from paft.report.headtohead import write_report
from paft.report.sparsity import sparsity
from paft.train.stage import train

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
    seconds: dict[str, float] = field(default_factory=dict)

    def adapter(self, name: str) -> Path:
        return self.out / "adapters" / name

    def merged(self, name: str) -> Path:
        return self.out / "merges" / name


def run(recipe: RunRecipe, out: Path, *, overwrite: bool = False, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Execute ``recipe`` under ``out`` and return the report (also written as report.json); see the module's docstring.

    Raises UsageError for a recipe that names unknown stages, MismatchError for a target that is not empty.
    """
    check(recipe)
    if not resume:
        provenance.check_target(out, overwrite=overwrite)
    job = Run(recipe, out, quiet)
    started = time.monotonic()
    _read_data(job)
    out.mkdir(parents=True, exist_ok=True)
    _train_all(job)
    _merge_all(job)
    scores = _evaluate_all(job)
    provenance.write_manifest(out, command="run", recipe=recipe.model_dump(), seed=recipe.seed,
                              base={"name": recipe.model, "content_sha256": job.base_hash},
                              inputs={"sft": data.content_hash(job.sft["train"]), "pref": data.content_hash(job.pref["train"])},
                              wall_s=round(time.monotonic() - started, 1))
    return write_report(out, recipe, scores, {name: sparsity(read_adapter(job.adapter(name))) for name in recipe.train},
                        wall_s=round(time.monotonic() - started, 1))


def check(recipe: RunRecipe) -> None:
    """UsageError for stage names that are unsafe, unknown, or defined after they are needed."""
    known: list[str] = []
    for name, stage in recipe.train.items():
        _check_name(name)
        if stage.on and stage.on not in known:
            raise UsageError(f"train.{name}.on: there is no earlier stage {stage.on!r}", hint=did_you_mean(stage.on, known))
        known.append(name)
    for name, entry in recipe.merge.items():
        _check_name(name)
        if name in recipe.train:
            raise UsageError(f"merge.{name}: a training stage has the same name")
        for source in [*entry.of, *filter(None, (entry.density_like, entry.norm_like))]:
            if source not in known:
                raise UsageError(f"merge.{name}: there is no training stage {source!r}", hint=did_you_mean(source, known))


def plan(recipe: RunRecipe, out: Path) -> dict[str, Any]:
    """What `run` would do: stages, rows, disk; nothing is written and no model is loaded."""
    check(recipe)
    job = Run(recipe, out)
    _read_data(job)
    size = sum(file.stat().st_size for file in provenance.tensor_files(resolve_base(recipe.model)))
    return {"out": str(out), "model": recipe.model, "base_bytes": size, "disk_bytes": size * len(recipe.merge),
            "rows": {"sft": {k: len(v) for k, v in job.sft.items()}, "pref": {k: len(v) for k, v in job.pref.items()}},
            "train": [{"name": name, "on": stage.on, "done": _is_done(job, name)} for name, stage in recipe.train.items()],
            "merge": list(recipe.merge), "evaluate": 1 + len(recipe.train) + len(recipe.merge)}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r} cannot be a stage's name", hint="use letters, digits, dot, dash and underscore")


def _read_data(job: Run) -> None:
    spec = job.recipe.data
    job.sft, job.pref = data.splits(spec.sft, "sft"), data.splits(spec.pref, "pref")
    if spec.text:
        split = job.recipe.evaluate.split
        job.text = data.load_rows(spec.text, "text", split if spec.text.startswith("demo:") else None)
    job.base_hash = provenance.content_hash(resolve_base(job.recipe.model))


def stage_recipe(recipe: RunRecipe, name: str, out: Path) -> SftRecipe | DpoRecipe | JointRecipe:
    """The full recipe of one training stage: the defaults of its objective, then what the stage says."""
    stage = recipe.train[name]
    base = {"sft": recipe.defaults.sft, "dpo": recipe.defaults.dpo, "joint": recipe.defaults.joint}[stage.objective]
    said = {key: value for key, value in (("l1", stage.l1), ("l2", stage.l2), ("lam", stage.lam)) if value is not None}
    said |= {"model": recipe.model, "seed": recipe.seed, "on": str(out / "adapters" / stage.on) if stage.on else None}
    said |= {"trainer": base.trainer | stage.trainer, **_sources(recipe, stage.objective)}
    return validate(type(base), base.model_dump() | said)


def _sources(recipe: RunRecipe, objective: str) -> dict[str, str]:
    first = {role: spec.train if isinstance(spec, Splits) else spec
             for role, spec in (("sft", recipe.data.sft), ("pref", recipe.data.pref))}
    return {"sft": {"data": first["sft"]}, "dpo": {"data": first["pref"]},
            "joint": {"sft_data": first["sft"], "pref_data": first["pref"]}}[objective]


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
    return (same and manifest["inputs"] == rows and manifest["base"]["content_sha256"] == job.base_hash
            and on == (before or {}).get("content_sha256"))


def _portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the paths that only say where this run lies; content is compared by hash."""
    return {key: value for key, value in recipe.items() if key not in ("model", "on")}


def _train_all(job: Run) -> None:
    todo = [name for name in job.recipe.train if not _is_done(job, name)]
    made: set[str] = set()
    for name, stage in job.recipe.train.items():
        if name not in todo and stage.on not in made:
            say(f"  {name:<14} kept", quiet=job.quiet)
            continue
        spent = sum(job.seconds.values())
        left = f", about {_minutes(spent / len(made) * (len(todo) - len(made)))} of training left" if made else ""
        say(f"  {name:<14} training{left}", quiet=job.quiet)
        manifest = train(stage_recipe(job.recipe, name, job.out), job.adapter(name), rows=_rows(job, stage.objective),
                         overwrite=True, quiet=job.quiet, label=name)
        job.seconds[name] = manifest["wall_s"]
        made.add(name)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _merge_all(job: Run) -> None:
    with Progress("merge", len(job.recipe.merge), quiet=job.quiet) as show:
        for done, (name, entry) in enumerate(job.recipe.merge.items(), 1):
            parameters, weights = _controls(job, entry)
            merge([str(job.adapter(source)) for source in entry.of], base=job.recipe.model, method=entry.method,
                  parameters=parameters, weights=weights, out=job.merged(name), dtype=job.recipe.merge_dtype,
                  seed=job.recipe.seed, overwrite=True)
            show(done, name)


def _controls(job: Run, entry: RunMerge) -> tuple[dict[str, Any], list[float] | None]:
    """Parameters and weights of a merge, with ``density_like`` and ``norm_like`` turned into numbers for its first delta."""
    parameters, weights = dict(entry.parameters), entry.weights
    if entry.density_like:
        kept = 1.0 - sparsity(read_adapter(job.adapter(entry.density_like))).overall.moments.share_scaled
        parameters["density"] = [max(kept, 1e-6), *[1.0] * (len(entry.of) - 1)]
    if entry.norm_like:
        norms = [sparsity(read_adapter(job.adapter(name))).overall.moments.frobenius for name in (entry.norm_like, entry.of[0])]
        weights = list(weights or [1.0] * len(entry.of))
        weights[0] *= norms[0] / norms[1] if norms[1] else 0.0
    return parameters, weights


def _evaluate_all(job: Run) -> dict[str, dict[str, float]]:
    recipe = job.recipe
    split = recipe.evaluate.split
    held = Held(job.sft[split], job.pref[split], job.text).head(recipe.evaluate.rows)
    base = load_model(recipe.model)
    tokenizer = load_tokenizer(recipe.model, chat=isinstance(held.sft[0].get("prompt"), list))
    beta = recipe.defaults.dpo.beta
    score = Evaluator(tokenizer, held, None, beta, recipe.evaluate.batch_size, recipe.evaluate.generate, recipe.evaluate.judge)
    score = score.against(base)
    scores: dict[str, dict[str, float]] = {}
    total = 1 + len(recipe.train) + len(recipe.merge)
    with Progress("evaluate", total, quiet=job.quiet) as show:
        for name, model in _candidates(job, base):
            scores[name] = score(model)
            show(len(scores), name)
    return scores


def _candidates(job: Run, base: Any) -> Iterator[tuple[str, Any]]:
    """The base, then every adapter on it, then every merged model; one of them in memory beside the base."""
    yield "base", base
    for name in job.recipe.train:
        yield name, wrap(load_model(job.recipe.model), job.adapter(name))
    for name in job.recipe.merge:
        yield name, load_model(str(job.merged(name)))
