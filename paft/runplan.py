"""A run's recipe before anything runs: is every stage possible, and what does each one do exactly."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from paft.errors import UsageError, did_you_mean
from paft.merge.settings import Settings, native
from paft.recipe import DpoRecipe, JointRecipe, RunMerge, RunRecipe, SftRecipe, Sources, Splits, TrainRecipe, validate
from paft.tasks import Harness
from paft.train.stage import check_trainer

RUNS_OWN = ("model", "seed", "on", "data", "eval_data", "sft_data", "pref_data", "sft_eval_data", "pref_eval_data",
            "eval_fraction", "columns", "sft_columns", "pref_columns", "streaming", "on_bad_row", "chat_template")


def check(recipe: RunRecipe) -> None:
    """UsageError for stage names that are unsafe, unknown, or defined after they are needed."""
    known: list[str] = []
    for name, stage in recipe.train.items():
        _check_name(name)
        if stage.on and stage.on not in known:
            raise UsageError(f"train.{name}.on: there is no earlier stage {stage.on!r}", hint=did_you_mean(stage.on, known))
        _check_stage(recipe, name)
        known.append(name)
    for name, entry in recipe.merge.items():
        _check_name(name)
        if name in recipe.train:
            raise UsageError(f"merge.{name}: a training stage has the same name")
        for source in [*entry.of, *filter(None, (entry.density_like, entry.norm_like))]:
            if source not in known:
                raise UsageError(f"merge.{name}: there is no training stage {source!r}", hint=did_you_mean(source, known))
        _check_merge(name, entry)
    _check_rest(recipe)
    _check_asked(recipe)


def tasks_of(recipe: RunRecipe) -> Harness | None:
    """The named tasks with their data, if the recipe has some; raises what `paft.tasks.Harness` does."""
    if (said := recipe.evaluate.tasks) is None:
        return None
    path = Path(said.path) if said.path else None
    return Harness(said.names, shots=said.shots, limit=said.limit, path=path, chat=said.chat,
                   batch_size=recipe.evaluate.batch_size)


def _check_asked(recipe: RunRecipe) -> None:
    rows = ["base", *recipe.train, *recipe.merge]
    for name in (recipe.evaluate.tasks.only or [] if recipe.evaluate.tasks else []):
        if name not in rows:
            raise UsageError(f"evaluate.tasks.only: there is no row {name!r}", hint=did_you_mean(name, rows))


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r} cannot be a stage's name", hint="use letters, digits, dot, dash and underscore")


def _check_stage(recipe: RunRecipe, name: str) -> None:
    try:
        check_trainer(stage_recipe(recipe, name, Path()))
    except UsageError as error:
        raise UsageError(f"train.{name}: {error.message}", hint=error.hint) from None


def _check_merge(name: str, entry: RunMerge) -> None:
    try:
        Settings.read(native(entry.method), entry.of, entry.parameters, entry.weights)
    except UsageError as error:
        raise UsageError(f"merge.{name}: {error.message}", hint=error.hint) from None


def _check_rest(recipe: RunRecipe) -> None:
    for objective, defaults in vars(recipe.defaults).items():
        assert isinstance(defaults, TrainRecipe)
        for key in sorted(defaults.model_fields_set & set(RUNS_OWN)):
            raise UsageError(f"defaults.{objective}.{key}: a run decides this itself", hint="remove it there")


def stage_recipe(recipe: RunRecipe, name: str, out: Path) -> SftRecipe | DpoRecipe | JointRecipe:
    """The full recipe of one training stage: the defaults of its objective, then what the stage says."""
    stage = recipe.train[name]
    base = {"sft": recipe.defaults.sft, "dpo": recipe.defaults.dpo, "joint": recipe.defaults.joint}[stage.objective]
    keys = stage.model_fields_set - {"objective", "on", "trainer", "label", "resources"}
    said = {key: getattr(stage, key) for key in keys if getattr(stage, key) is not None}
    said |= {"model": recipe.model, "seed": recipe.seed, "on": str(out / "adapters" / stage.on) if stage.on else None}
    said |= {"chat_template": recipe.chat_template, "on_bad_row": recipe.on_bad_row}
    said |= {"trainer": _on_the_way(recipe, stage.objective) | base.trainer | stage.trainer, **_sources(recipe, stage.objective)}
    return validate(type(base), base.model_dump() | said)


def _on_the_way(recipe: RunRecipe, objective: str) -> dict[str, Any]:
    """When a joint training is measured, if a trajectory is wanted. `Trainer` takes a share of the steps, which must be below 1,
    and rounds up; rounded down itself, six of 240 steps are every 40."""
    count = recipe.evaluate.trajectory
    if objective != "joint" or not count:
        return {}
    return {"eval_strategy": "steps", "eval_steps": min(math.floor(1e6 / count) / 1e6, 0.999999)}


def _sources(recipe: RunRecipe, objective: str) -> dict[str, Sources]:
    first = {role: spec.train if isinstance(spec, Splits) else spec
             for role, spec in (("sft", recipe.data.sft), ("pref", recipe.data.pref))}
    return {"sft": {"data": first["sft"]}, "dpo": {"data": first["pref"]},
            "joint": {"sft_data": first["sft"], "pref_data": first["pref"]}}[objective]
