"""Trainings beside each other: what each reached in both objectives, how far from the ideal point, and what it cost.

    gap         f - f* on held-out rows, in nats; f* is the training's own optimum (`paft.train.optima`), or one that another
                training of the same base and held-out rows knows (of the same seed if there is one), or the best end of the table
    ideal       √(Δ²_DPO + Δ²_SFT)                                      (ALRIGHT / MAXRIGHT, arXiv 2410.15483, section 6.1)
                where an objective below its f* counts as at it, as in `paft.train.heldout`
    runtime     (T - T_sequential) / T_sequential · 100 %, memory likewise                                  (eq. 57 and 58)

Trainings of one recipe that differ in the seed alone are one row: mean ± standard error of the mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft.errors import MismatchError, NotFoundError, UsageError
from paft.provenance import MANIFEST, read_manifest
from paft.report.paired import mean_error
from paft.train.work import read_log

Record = Mapping[str, Any]
Point = tuple[float, float]  # (f_SFT, f_DPO)

SEQUENTIAL = {"dpo-sft": "DPO then SFT", "sft-dpo": "SFT then DPO"}
TITLES = {"mix": "Mix", "alright": "ALRIGHT", "maxright": "MAXRIGHT", "uft": "UFT"}
_WEIGHED = ("mix", "alright", "maxright", "sequential")  # at λ = 0 and 1 they are one objective alone
COST = ("seconds", "tokens", "memory_mb")
_MEASURES = {"sft_loss": "eval_sft_loss", "dpo_loss": "eval_dpo_loss", "pref_accuracy": "eval_pref_accuracy"}
# A trainer of one objective measures that one alone, by the names of TRL.
_ALONE = {"train-sft": {"sft_loss": "eval_loss"},
          "train-dpo": {"dpo_loss": "eval_loss", "pref_accuracy": "eval_rewards/accuracies"}}
_HINT = "train it with held-out rows: --eval-fraction 0.1"


@dataclass(frozen=True)
class Training:
    """One training as its log and its `paft.json` tell it. ``evaluations``: step, seconds, tokens and losses of each."""

    name: str
    title: str
    recipe: Mapping[str, Any]
    seed: int | None
    base: str
    held: Mapping[str, str]  # objective -> hash of the rows it was measured on
    evaluations: tuple[Record, ...]
    end: Record
    chosen: str  # the objective of each step: D, S, or B for both
    optima: Mapping[str, float]

    @property
    def points(self) -> list[Point]:
        """Where it was in the objective space, evaluation by evaluation."""
        return [(each["sft_loss"], each["dpo_loss"]) for each in self.evaluations if {"sft_loss", "dpo_loss"} <= each.keys()]

    @property
    def last(self) -> Point | None:
        """Where it ended; None if one of the objectives was not measured."""
        return (self.end["sft_loss"], self.end["dpo_loss"]) if {"sft_loss", "dpo_loss"} <= self.end.keys() else None

    @property
    def sequential(self) -> bool:
        return self.title in SEQUENTIAL.values()


@dataclass(frozen=True)
class Aim:
    """f* of both objectives; ``origin``: own, other (of another training) or table."""

    dpo: float
    sft: float
    origin: str


@dataclass(frozen=True)
class Group:
    """Trainings that differ in the seed alone, what each aimed at, and their row of the table."""

    members: tuple[Training, ...]
    aims: tuple[Aim | None, ...]
    row: Mapping[str, Any]
    label: str  # the row's name, with λ where several rows have that name

    @property
    def ideals(self) -> dict[int | None, float]:
        """seed -> ideal distance."""
        found = {one.seed: distances(one, aim).get("ideal") for one, aim in zip(self.members, self.aims, strict=True)}
        return {seed: value for seed, value in found.items() if value is not None}


def read(directory: Path) -> Training:
    """The training in a directory; NotFoundError where there is none, UsageError where it was never evaluated."""
    manifest = read_manifest(directory)
    if manifest is None or not (directory / "log.jsonl").is_file():
        begun = directory.with_name(directory.name + ".partial").is_dir()
        raise NotFoundError(f"{directory} holds no {'log.jsonl' if manifest else MANIFEST}", hint="its training is not finished: "
                            "--resume finishes it" if begun else "name what `paft train-joint` has made")
    recipe, command = manifest.get("recipe") or {}, str(manifest.get("command"))
    alone = _ALONE.get(command, {})
    if command == "train-dpo" and recipe.get("loss", {"sigmoid": 1.0}) != {"sigmoid": 1.0}:
        alone = {"pref_accuracy": alone["pref_accuracy"]}  # the loss is another than DPO's
    records = read_log(directory / "log.jsonl")
    evaluations = tuple(filter(None, (_evaluation(each, alone) for each in records)))
    if not evaluations:
        raise UsageError(f"{directory} has no evaluation of an objective in its log", hint=_HINT)
    best = (manifest.get("metrics") or {}).get("best_step")
    end = next((each for each in evaluations if each["step"] == best), evaluations[-1])
    base, inputs = manifest.get("base") or {}, manifest.get("inputs") or {}
    return Training(name=directory.resolve().name, title=_title(command, recipe), recipe=recipe, seed=manifest.get("seed"),
                    base=str(base.get("content_sha256")), held=_held(command, inputs), evaluations=evaluations,
                    end={**end, **_cost(evaluations[-1], records, manifest)},
                    chosen="".join(str(each.get("chosen", "")) for each in records), optima=_optima(manifest.get("optima") or {}))


def _evaluation(record: Mapping[str, Any], alone: Mapping[str, str]) -> dict[str, Any] | None:
    names = _MEASURES if "eval_sft_loss" in record else alone
    found = {ours: float(record[theirs]) for ours, theirs in names.items() if theirs in record}
    return {"step": record["step"], **found} | _spent(record) if found else None


def _spent(record: Mapping[str, Any]) -> dict[str, float]:
    named = {"seconds": "seconds", "tokens": "tokens", "memory_mb": "peak_memory_mb"}
    return {ours: record[theirs] for ours, theirs in named.items() if theirs in record}


def cost(directory: Path) -> dict[str, float]:
    """Seconds, tokens and memory of the training in a directory, as far as it has told them.

    Its seconds are of wall time, with the trainings that estimated f* for it, and without any evaluation on the way.
    """
    manifest = read_manifest(directory) or {}
    records, metrics = read_log(directory / "log.jsonl"), manifest.get("metrics") or {}
    found = _cost({key: metrics[key] for key in ("tokens",) if key in metrics}, records, manifest)
    if "seconds" in found:
        estimated = (manifest.get("optima") or {}).get("path")
        alone = map(read_log, (directory.parent / estimated).glob("*/log.jsonl")) if estimated else ()
        found["seconds"] -= sum(map(_evaluating, (records, *alone)))
    return {key: value for key, value in found.items() if key in COST}


def _evaluating(records: Sequence[Record]) -> float:
    """Seconds that a training has spent on evaluations."""
    return max((each.get("evaluation_seconds", 0.0) for each in records), default=0.0)


def way(directory: Path) -> dict[int, Point]:
    """step -> (f_SFT, f_DPO) of each evaluation of both on the way of the training in a directory; the later of two of a step."""
    found = filter(None, (_evaluation(each, {}) for each in read_log(directory / "log.jsonl")))
    return {int(each["step"]): (each["sft_loss"], each["dpo_loss"]) for each in found}


def _cost(last: Record, records: Sequence[Record], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the whole training cost; where the evaluations do not say, `paft.json` does: its seconds contain the evaluations."""
    memory = manifest.get("peak_device_memory_mb") or manifest.get("peak_memory_mb")
    counted = [each["num_tokens"] for each in records if "num_tokens" in each]
    told = {"seconds": manifest.get("wall_s"), "tokens": counted[-1] if counted else None, "memory_mb": memory}
    told = {key: value for key, value in told.items() if value is not None}
    steps = max((each["step"] for each in records if "step" in each), default=0)
    return told | {key: last[key] for key in COST if key in last} | {"steps": steps}


def _optima(recorded: Mapping[str, Any]) -> dict[str, float]:
    """f* on held-out rows, as `paft.train.optima` records it."""
    estimated = recorded.get("estimated", {})
    found = recorded.get("given") or {name: each["held"] for name, each in estimated.items() if "held" in each}
    return dict(found) if len(found) == 2 else {}


def _held(command: str, inputs: Mapping[str, str]) -> dict[str, str]:
    names = {"train-sft": {"sft": "eval"}, "train-dpo": {"dpo": "eval"}}.get(command, {"sft": "sft_eval", "dpo": "pref_eval"})
    return {objective: inputs[name] for objective, name in names.items() if name in inputs}


def _title(command: str, recipe: Mapping[str, Any]) -> str:
    """``ALRIGHT``, ``DPO then SFT``, ``SFT alone`` (as which λ = 0 counts), ... and whether there is an L1 term."""
    loss = "+".join(name.upper() for name in recipe.get("loss") or {"sigmoid": 1.0}).replace("SIGMOID", "DPO")
    alone, method = {"train-sft": "SFT alone", "train-dpo": f"{loss} alone"}, str(recipe.get("method", ""))
    titles = TITLES | {"sequential": SEQUENTIAL.get(str(recipe.get("order")), "Sequential")}
    if method in _WEIGHED:
        alone[command] = {0.0: "SFT alone", 1.0: f"{loss} alone"}.get(recipe.get("lam", 0.5), "")
    name = alone.get(command) or titles.get(method, method)
    return name + (", L1" if recipe.get("l1") or recipe.get("l1_target_sparsity") else "")


def aims(trainings: Sequence[Training]) -> list[Aim | None]:
    """What each training is measured against; None where the table has no value of one of the objectives."""
    ends = [each.last for each in trainings if each.last]
    best = Aim(min(dpo for _, dpo in ends), min(sft for sft, _ in ends), "table") if len(ends) > 1 else None
    found: list[Aim | None] = []
    for each in trainings:
        known = [one for one in trainings if one.optima and (one.base, one.held) == (each.base, each.held)]
        known.sort(key=lambda one: one.seed != each.seed)
        optima = each.optima or (known[0].optima if known else {})
        found.append(Aim(optima["dpo"], optima["sft"], "own" if each.optima else "other") if optima else best)
    return found


def distances(training: Training, aim: Aim | None) -> dict[str, float]:
    """The gaps and the ideal distance of a training's end, as far as both are known."""
    if aim is None:
        return {}
    gaps = {f"{name}_gap": training.end[f"{name}_loss"] - getattr(aim, name) for name in ("sft", "dpo")
            if f"{name}_loss" in training.end}
    return gaps | ({"ideal": math.hypot(*(max(gap, 0.0) for gap in gaps.values()))} if len(gaps) == 2 else {})


def grouped(trainings: Sequence[Training]) -> list[Group]:
    """One group a recipe but for its seed, in the order given; MismatchError for two trainings of one recipe and seed."""
    members: dict[str, list[tuple[Training, Aim | None]]] = {}
    for training, aim in zip(trainings, aims(trainings), strict=True):
        said = {key: value for key, value in training.recipe.items() if key != "seed"}
        members.setdefault(json.dumps([training.title, training.base, said], sort_keys=True), []).append((training, aim))
    for found in members.values():
        seeds = [one.seed for one, _ in found]
        if twice := [one.name for one, _ in found if seeds.count(one.seed) > 1]:
            raise MismatchError(f"{twice[0]} and {twice[1]} are of one recipe and one seed", hint="name each training once")
    rows = [_row(found) for found in members.values()]
    _tell_apart(rows, [found[0][0].recipe for found in members.values()])
    _relate(rows, [found[0][0].sequential for found in members.values()])
    names = [row["name"] for row in rows]
    labels = [row["name"] + (f", λ {row['lam']:g}" if names.count(row["name"]) > 1 and row["lam"] is not None else "")
              for row in rows]
    return [Group(tuple(one for one, _ in found), tuple(aim for _, aim in found), row, label)
            for found, row, label in zip(members.values(), rows, labels, strict=True)]


def _row(found: Sequence[tuple[Training, Aim | None]]) -> dict[str, Any]:
    first = found[0][0]
    values = [{key: value for key, value in one.end.items() if key != "step"} | distances(one, aim) for one, aim in found]
    row: dict[str, Any] = {"name": first.title, "directories": [one.name for one, _ in found], "runs": len(found),
                           "seeds": [one.seed for one, _ in found], "lam": first.recipe.get("lam"),
                           "ideal_from": sorted({aim.origin for _, aim in found if aim})}
    for key in dict.fromkeys(key for one in values for key in one):
        mean, error = mean_error([one[key] for one in values if key in one])
        row |= {key: mean, f"{key}_se": error}
    row["steps"] = int(row["steps"]) if row["steps"] == int(row["steps"]) else row["steps"]
    return row


def _tell_apart(rows: Sequence[dict[str, Any]], recipes: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one method and λ get the settings that differ into their names."""
    alike: dict[tuple[str, Any], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault((row["name"], row["lam"]), []).append(index)
    for indices in (found for found in alike.values() if len(found) > 1):
        flat = [_flat(recipes[index]) for index in indices]
        keys = [key for key in dict.fromkeys(key for one in flat for key in one)
                if len({json.dumps(one.get(key)) for one in flat}) > 1 and key != "seed"]
        for index, one in zip(indices, flat, strict=True):
            told = "".join(f", {key.rpartition('.')[2]} {one.get(key)}" for key in keys[:3])
            rows[index]["name"] += told or f" ({rows[index]['directories'][0]})"


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _relate(rows: Sequence[dict[str, Any]], sequential: Sequence[bool]) -> None:
    """``runtime_pct`` and ``memory_pct``: beside the sequential rows of the same λ, or of any where there is none."""
    for row in (one for one, is_one in zip(rows, sequential, strict=True) if not is_one):
        every = [one for one, is_one in zip(rows, sequential, strict=True) if is_one]
        against = [one for one in every if one["lam"] == row["lam"]] or every
        for key, ours in (("seconds", "runtime_pct"), ("memory_mb", "memory_pct")):
            other = [one[key] for one in against if key in one]
            if other and key in row and sum(other):
                row[ours] = (row[key] / (sum(other) / len(other)) - 1.0) * 100.0
