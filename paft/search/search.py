"""A search from adapters to a directory of recipes, over one base in memory.

    OUT/front.json  front.png  NN-METHOD.yaml  paft.json      written at the end, complete or not at all
    STUDY.db                                                  grows trial by trial; more processes may join it
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from paft import data, provenance
from paft.errors import MismatchError, ResourceError, UsageError
from paft.evaluate import Evaluator, Held
from paft.executor import LOCAL, Executor
from paft.merge.inputs import Inputs, open_inputs
from paft.merge.resident import Resident, open_job
from paft.models import check_load, device, load_model, load_tokenizer
from paft.recipe import MergeRecipe
from paft.search.space import Space, make_space
from paft.train.work import turn_at


@dataclass(frozen=True)
class Plan:
    """What is searched: adapters over a base, and on what candidates are scored. ``validation`` chooses, ``test`` tells."""

    adapters: tuple[str, ...]
    base: str | None
    validation: Held
    test: Held
    beta: float = 0.1
    batch_size: int = 64
    template: str | None = None
    dtype: str = "float32"


@dataclass
class _Bench:
    """One base in memory, and who scores what is made of it."""

    inputs: Inputs
    resident: Resident
    validation: Evaluator
    test: Evaluator

    def score(self, recipe: MergeRecipe, scorer: Evaluator) -> dict[str, float]:
        self.resident.apply(open_job(recipe, self.inputs, device=device()))
        return scorer(self.resident.model)


def search(plan: Plan, out: Path, study_file: Path, *, trials: int, methods: Sequence[str] | None = None,
           ranges: Mapping[str, tuple[float, float]] | None = None, groups: int = 1, seed: int = 0, resume: bool = False,
           overwrite: bool = False, quiet: bool = False, executor: Executor = LOCAL,
           workers: int | None = None) -> dict[str, Any]:
    """Search until the study has ``trials`` finished trials, write the front into ``out`` and return what front.json holds.

    On Ray ``workers`` tasks, by default as many as the cluster has room for, join the study; the front is made here.
    Raises ResourceError without Optuna, UsageError and MismatchError as `make_space`, `open_study` and the merge do.
    """
    check_optuna()
    if trials < 1 or len(plan.adapters) < 2:
        raise UsageError("a search merges at least two adapters", hint="paft search ADAPTER ADAPTER --sft-data D --pref-data D")
    provenance.check_target(out, overwrite=overwrite or resume)
    data.check_leakage({"validation rows": plan.validation.sft, "test rows": plan.test.sft})
    data.check_leakage({"validation rows": plan.validation.pref, "test rows": plan.test.pref})
    executor.join()
    inputs, space = _space(plan, asked := _Asked(methods, ranges, groups, seed))
    from paft.search.study import complete

    check_load(inputs.base.path, dtype=plan.dtype)
    study = _study(plan, inputs, space, study_file, resume=resume)
    if executor.spreads and len(complete(study)) < trials:
        size = sum(entry.nbytes for entry in inputs.base.entries.values())
        names = [f"{out.name}-{number}" for number in range(1, 1 + (workers or executor.room_for(size)))]
        executor.graph(dict.fromkeys(names), partial(_join, plan, asked, study_file.absolute(), trials), workers=0,
                       done=lambda name, result: None, room=study_file.parent, asks=dict.fromkeys(names, executor.ask(size)))
    bench = _bench(plan, inputs)
    try:
        _try(bench, space, study, trials, quiet=quiet)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; {len(complete(study))} finished trials are kept in {study_file}",
                                "the same command with --resume continues") from stop
    return _finish(plan, out, study_file, study, bench, space, overwrite=overwrite or resume)


@dataclass(frozen=True)
class _Asked:
    """What of a search is asked for, as every process that joins it must have it."""

    methods: Sequence[str] | None
    ranges: Mapping[str, tuple[float, float]] | None
    groups: int
    seed: int


def _space(plan: Plan, asked: _Asked) -> tuple[Inputs, Space]:
    inputs = open_inputs(plan.adapters, plan.base, weights=True)
    return inputs, make_space(inputs, plan.adapters, plan.base or inputs.reference, chosen=asked.methods, ranges=asked.ranges,
                              groups=asked.groups, seed=asked.seed)


def _study(plan: Plan, inputs: Inputs, space: Space, file: Path, *, resume: bool) -> Any:
    from paft.search.study import Seeded, open_study

    return open_study(file, Seeded(space.seed, space.anchors()), _about(plan, inputs, space), resume=resume)


def _join(plan: Plan, asked: _Asked, file: Path, trials: int, name: str) -> None:
    """In a worker: take part in the study until it has its trials."""
    inputs, space = _space(plan, asked)
    _try(_bench(plan, inputs), space, _study(plan, inputs, space, file, resume=True), trials)


def _try(bench: _Bench, space: Space, study: Any, trials: int, *, quiet: bool = False) -> None:
    from paft.search.study import run_trials

    def objective(trial: Any) -> tuple[float, float]:
        started, recipe = time.monotonic(), space.suggest(trial)
        scores = bench.score(recipe, bench.validation)
        trial.set_user_attr("recipe", recipe.model_dump())
        trial.set_user_attr("scores", scores)
        trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
        return scores["sft_loss"], scores["dpo_loss"]

    run_trials(study, trials, objective, quiet=quiet)


def check_optuna() -> None:
    """ResourceError where Optuna is not there."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ResourceError("paft search needs Optuna", hint="pip install 'paft[search]'") from error


def _bench(plan: Plan, inputs: Inputs) -> _Bench:
    base = plan.base or inputs.reference
    model = load_model(base, dtype=plan.dtype)
    chat = any(isinstance(rows[0].get("prompt"), list) for rows in (plan.validation.sft, plan.validation.pref))
    tokenizer = load_tokenizer(base, chat=chat, template=plan.template)
    validation, test = (Evaluator(tokenizer, held, None, plan.beta, plan.batch_size).against(model)
                        for held in (plan.validation, plan.test))
    return _Bench(inputs, Resident(model, inputs.base), validation, test)


def _about(plan: Plan, inputs: Inputs, space: Space) -> dict[str, Any]:
    """What two processes must have in common to share a study."""
    rows = [*vars(plan.validation).values(), *vars(plan.test).values()]
    return {"adapters": [delta.content_hash for delta in inputs.deltas], "data": [data.content_hash(each) for each in rows],
            "methods": list(space.methods), "ranges": {key: list(pair) for key, pair in space.ranges.items()},
            "layer groups": len(space.groups), "seed": space.seed, "beta": plan.beta, "dtype": plan.dtype}


def _finish(plan: Plan, out: Path, study_file: Path, study: Any, bench: _Bench, space: Space, *,
            overwrite: bool) -> dict[str, Any]:
    """Score the front on the test rows, once for each point whoever asks, and write all that is asked for."""
    from paft.search.front import front_figure, front_of, rows_of, write_recipes
    from paft.search.study import complete

    trials = complete(study)
    front = front_of(trials)
    rows = rows_of(front, {trial.number: _tested(study, bench, str(trial.number), MergeRecipe(**trial.user_attrs["recipe"]))
                           for trial in front})
    others = _others(study, bench, space)
    seconds = sorted(trial.user_attrs["seconds"] for trial in trials)
    report = {"schema": 1, "trials": len(trials), "seconds_per_trial": seconds[len(seconds) // 2], "seed": space.seed,
              "nearest": min(rows, key=lambda row: row["validation_ideal"])["point"], "study": str(study_file),
              "front": rows, "others": others,
              "rows": {name: {key: len(some) for key, some in vars(held).items()}
                       for name, held in (("validation", plan.validation), ("test", plan.test))},
              "all": [{"trial": one.number, "recipe": one.user_attrs["recipe"], **one.user_attrs["scores"]} for one in trials]}
    inputs = bench.inputs
    hashes = [{"name": name, "content_sha256": d.content_hash} for name, d in zip(inputs.names, inputs.deltas, strict=True)]
    turn = study_file.with_name(f".{study_file.name}.turn")  # the others of this study write the same
    with turn_at(turn, quiet=True), provenance.output_dir(out, overwrite=overwrite) as scratch:
        write_recipes(scratch, rows, front)
        front_figure(scratch / "front.png", trials, rows, others)
        (scratch / "front.json").write_text(provenance.to_json(report), encoding="utf-8")
        provenance.write_manifest(scratch, command="paft search", recipe=_about(plan, inputs, space), seed=space.seed,
                                  inputs=hashes, base={"name": inputs.base_name})
    return report | {"out": str(out)}


def _others(study: Any, bench: _Bench, space: Space) -> list[dict[str, Any]]:
    """What the front is read against, on the test rows: the base, and each adapter alone."""
    count = range(len(space.adapters))
    alone = [MergeRecipe(method="task_arithmetic", adapters=list(space.adapters), base=space.base,
                         weights=[float(i == one) for i in count]) for one in count]
    found = [{"point": f"{name} alone", **_tested(study, bench, f"alone {i}", recipe)}
             for i, (name, recipe) in enumerate(zip(bench.inputs.names, alone, strict=True))]
    bench.resident.undo()
    return [{"point": "base", **bench.test(bench.resident.model)}, *found]


def _tested(study: Any, bench: _Bench, key: str, recipe: MergeRecipe) -> dict[str, float]:
    known = study.user_attrs.get(f"test {key}")
    if known is None:
        known = bench.score(recipe, bench.test)
        if not all(value == value for value in known.values()):
            raise MismatchError(f"trial {key} gives NaN on the test rows")
        study.set_user_attr(f"test {key}", known)
    return known
