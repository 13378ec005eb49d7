"""One pipeline over several seeds: the mean of every number, and intervals for what is paired within a run.

    gap           f - f*, f* the best of the run's own table                  ideal     √(Δ²_DPO + Δ²_SFT)
    tax           f - f of the specialist: SFT alone for the SFT loss, DPO alone for the DPO loss
    forgetting    loss on neutral text - that of the base
    vs            number of a row - number of another row of the same run; over the runs mean and bootstrap (`paft.report.paired`)
    cost          seconds and tokens of all trainings that a row needs, the largest memory of them

All in nats; less is better everywhere but in shares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from paft.errors import MismatchError, NotFoundError, UsageError
from paft.provenance import MANIFEST, read_manifest
from paft.report.paired import Difference, difference, mean_error
from paft.report.trainings import COST, Point, cost, way

OBJECTIVES = ("sft_loss", "dpo_loss")
COMPARED = ("ideal", *OBJECTIVES)
_IN_ONE = ("sequential",)  # methods of joint training that take one objective after the other
_WORDS = ("name", "id", "group", "on", "after")
COMBINED = ("sequential", "joint", "merge", "control")  # groups of rows that have seen both objectives
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One finished `paft run`: its seed, its recipe without the seed, its rows by id, and of each training what it cost, and
    the way of its held-out losses."""

    path: Path
    seed: int
    recipe: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    costs: Mapping[str, Mapping[str, float]]
    ways: Mapping[str, Mapping[int, Point]]


def read_run(directory: Path) -> Run:
    """The run in a directory; NotFoundError where it is not finished."""
    manifest = read_manifest(directory)
    file = directory / "report.json"
    if manifest is None or not file.is_file():
        raise NotFoundError(f"{directory} holds no {file.name if manifest else MANIFEST}: the run is not finished",
                            hint="`paft run ... --resume` finishes it")
    try:
        rows = {row["id"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
        recipe, seed = {key: value for key, value in manifest["recipe"].items() if key != "seed"}, int(manifest["seed"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MismatchError(f"{file} is not the report of a run", hint="`paft run ... --resume` writes it again") from None
    stages = {name: directory / "adapters" / name for name in recipe.get("train", {})}
    return Run(directory, seed, recipe, rows, {name: cost(place) for name, place in stages.items()},
               {name: way(place) for name, place in stages.items()})


def check_alike(runs: Sequence[Run]) -> None:
    """MismatchError unless the runs are of one recipe and have seeds of their own."""
    first = runs[0]
    for one in runs[1:]:
        keys = [key for key in {**first.recipe, **one.recipe} if first.recipe.get(key) != one.recipe.get(key)]
        if keys:
            raise MismatchError(f"{one.path} was run with another {keys[0]} than {first.path}",
                                hint="compare the seeds of one recipe at a time")
        if one.rows.keys() != first.rows.keys():
            raise MismatchError(f"{one.path} has other rows than {first.path}", hint="finish both with `paft run ... --resume`")
    seeds = [one.seed for one in runs]
    if twice := [one for one in runs if seeds.count(one.seed) > 1]:
        raise MismatchError(f"{twice[0].path} is of seed {twice[0].seed}, and so is another", hint="name each seed once")


@dataclass(frozen=True)
class Study:
    """The runs of one recipe; ``rows`` has one row a candidate, in the recipe's order."""

    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.runs[0].recipe

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    def name(self, row: str) -> str:
        return str(self.runs[0].rows[row]["name"])

    def values(self, row: str, metric: str) -> list[float]:
        """A metric of a row in each run; NaN where it was not measured."""
        return [float(run.rows[row].get(metric, math.nan)) for run in self.runs]

    def differences(self, left: Iterable[str], right: Iterable[str], metric: str) -> list[float]:
        """Mean of the left rows - mean of the right rows, in each run."""
        sides = [[mean(each) for each in zip(*(self.values(row, metric) for row in side), strict=True)] for side in (left, right)]
        return [one - other for one, other in zip(*sides, strict=True)]

    def vs(self, left: Iterable[str], right: Iterable[str], metric: str) -> Difference:
        """`differences` with their interval."""
        return difference(self.differences(left, right, metric))

    def alone(self, objective: str) -> str | None:
        """The row of the plain training of one objective, from the base."""
        return next((name for name, stage in self.recipe.get("train", {}).items()
                     if stage["objective"] == objective and not stage.get("on") and plain(stage)), None)

    def sequences(self) -> list[str]:
        """The plain sequences of both objectives, as two stages or in one, nearest to the ideal point first."""
        train = self.recipe.get("train", {})
        found = [name for name, stage in train.items() if (plain(stage) and stage.get("method") in _IN_ONE) or (stage.get("on")
                 and plain(stage) and plain(train[stage["on"]]) and train[stage["on"]]["objective"] != stage["objective"])]
        return sorted(found, key=lambda name: mean(self.values(name, "ideal")))

    def baselines(self) -> dict[str, str]:
        """What every row is compared with: ``sequential``, the best of its rows, and ``dpo`` alone."""
        found = {"sequential": next(iter(self.sequences()), None), "dpo": self.alone("dpo")}
        return {key: row for key, row in found.items() if row is not None}

    def rows(self) -> list[Row]:
        """One row a candidate: ``metric`` and ``metric_se``, the cost, and ``vs`` = {baseline: {metric: difference}}."""
        baselines = self.baselines()
        return [self._row(name, baselines) for name in self.runs[0].rows]

    def _row(self, name: str, baselines: Mapping[str, str]) -> Row:
        first = self.runs[0].rows[name]
        row: Row = {"name": first["name"], "id": name, "group": first["group"], "runs": len(self.runs)}
        errors = [f"{task}_stderr" for task in first.get("tasks", {})]  # of one run's rows; here the seeds tell it
        measured = {key: self.values(name, key) for key, value in first.items()
                    if key not in (*_WORDS, *errors) and isinstance(value, int | float)}
        for key, values in (measured | self._derived(name) | self._costs(name)).items():
            row |= zip((key, f"{key}_se"), mean_error(values), strict=True)
        row["vs"] = {base: {metric: self.vs([name], [other], metric).to_dict() for metric in COMPARED if metric in measured}
                     for base, other in baselines.items() if other != name}
        return row

    def _derived(self, name: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for key, gap in zip(OBJECTIVES, ("sft_gap", "dpo_gap"), strict=True):
            best = [min((float(each[key]) for each in run.rows.values() if key in each), default=math.nan) for run in self.runs]
            found[gap] = [value - least for value, least in zip(self.values(name, key), best, strict=True)]
        against = [("sft_tax", "sft_loss", self.alone("sft")), ("dpo_tax", "dpo_loss", self.alone("dpo")),
                   ("forgetting", "text_loss", "base" if "base" in self.runs[0].rows else None)]
        for key, metric, other in against:
            if other:
                found[key] = [a - b for a, b in zip(self.values(name, metric), self.values(other, metric), strict=True)]
        return {key: values for key, values in found.items() if not any(map(math.isnan, values))}

    def _costs(self, name: str) -> dict[str, list[float]]:
        needs = needed(self.recipe, name)
        found: dict[str, list[float]] = {}
        for key, total in zip(COST, (sum, sum, max), strict=True):
            values = [[run.costs[stage][key] for stage in needs if key in run.costs[stage]] for run in self.runs]
            if needs and all(len(each) == len(needs) for each in values):
                found[key] = [total(each) for each in values]
        return found


def study(directories: Sequence[Path]) -> Study:
    """Runs of one recipe, by rising seed; UsageError for none."""
    if not directories:
        raise UsageError("nothing to compare", hint="name what `paft run` has made")
    runs = [read_run(directory) for directory in directories]
    check_alike(runs)
    return Study(tuple(sorted(runs, key=lambda run: run.seed)))


def plain(stage: Mapping[str, Any]) -> bool:
    """Has a training stage neither a penalty nor another loss than DPO's?"""
    penalised = any(stage.get(key) for key in ("l1", "l2", "l1_target_sparsity"))
    return not penalised and (stage.get("loss") or "sigmoid") in ("sigmoid", {"sigmoid": 1.0})


def sparse(stage: Mapping[str, Any]) -> bool:
    """Does a training stage have an L1 term?"""
    return bool(stage.get("l1") or stage.get("l1_target_sparsity"))


def needed(recipe: Mapping[str, Any], name: str) -> list[str]:
    """The training stages that a row of the table needs, those before it included."""
    train, merge = recipe.get("train", {}), recipe.get("merge", {})
    wanted = [name] if name in train else list(merge.get(name, {}).get("of", []))
    wanted += [like for key in ("density_like", "norm_like") if (like := merge.get(name, {}).get(key))]
    found: dict[str, None] = {}
    while wanted:
        stage = wanted.pop(0)
        found[stage] = None
        wanted += [before] if (before := train[stage].get("on")) else []
    return list(found)
