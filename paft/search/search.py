"""A search from adapters to a directory of recipes, over one base in memory.

    OUT/front.json  front.png  NN-METHOD.yaml  paft.json      written at the end, complete or not at all
    STUDY.db                                                  grows trial by trial; more processes may join it
    URL.journal                                               where OUT is a URL: the study of the driver's machine, copied there
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
from paft.store import Store, making
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


def search(plan: Plan, out: Path | Store, study_file: Path | None = None, *, trials: int, methods: Sequence[str] | None = None,
           ranges: Mapping[str, tuple[float, float]] | None = None, groups: int = 1, seed: int = 0, resume: bool = False,
           overwrite: bool = False, quiet: bool = False, executor: Executor = LOCAL,
           workers: int | None = None) -> dict[str, Any]:
    """Search until the study has ``trials`` finished trials, write the front into ``out`` and return what front.json holds.

    The study is ``study_file``, by default OUT.db, or for Ray OUT.journal. On Ray ``workers`` tasks, by default as many as the
    cluster has room for, join the study; the front is made here. Raises ResourceError without Optuna, UsageError and
    MismatchError as `make_space`, `open_study` and the merge do.
    """
    check_optuna()
    if trials < 1 or len(plan.adapters) < 2:
        raise UsageError("a search merges at least two adapters", hint="paft search ADAPTER ADAPTER --sft-data D --pref-data D")
    if study_file and isinstance(out, Store):
        raise UsageError("the study of a search into a URL is beside it", hint=f"leave out --study: it is {out}.journal")
    data.check_leakage({"validation rows": plan.validation.sft, "test rows": plan.test.sft})
    data.check_leakage({"validation rows": plan.validation.pref, "test rows": plan.test.pref})
    asked = _Asked(plan, _Settings(methods, ranges, groups, seed), trials)
    if not isinstance(out, Store):
        provenance.check_target(out, overwrite=overwrite or resume)
        file = study_file or _beside(out, shared=executor.spreads)
        return _search(asked, _Target(out, file, file.parent, str(file)), executor, workers, quiet, resume, overwrite)
    from paft.search.journal import SUFFIX, journal_of

    with making(out, overwrite=overwrite, resume=resume) as place, journal_of(out, resume=resume) as file:
        target = _Target(place, file, out.apart()[0], f"{out}{SUFFIX}")
        return _search(asked, target, executor, workers, quiet, resume, True) | {"out": str(out)}


@dataclass(frozen=True)
class _Target:
    """Where a search goes: the directory and the study on this machine, the logs, and what the study is called."""

    out: Path
    study: Path
    logs: Path | Store
    name: str


def _beside(out: Path, *, shared: bool) -> Path:
    """The study beside ``out``: the one that is there, else SQLite, or on a shared disk the journal."""
    files = [out.with_name(out.name + suffix) for suffix in (".db", ".journal")]
    return next((file for file in files if file.exists()), files[shared])


def _search(asked: _Asked, target: _Target, executor: Executor, workers: int | None, quiet: bool, resume: bool,
            overwrite: bool) -> dict[str, Any]:
    executor.join()
    inputs, space = asked.space()
    from paft.search.study import complete

    check_load(inputs.base.path, dtype=asked.plan.dtype)
    study = asked.study(inputs, space, target.study, resume=resume, name=target.name)
    try:
        if executor.spreads and len(complete(study)) < asked.trials:
            size = sum(entry.nbytes for entry in inputs.base.entries.values())
            names = [f"{target.out.name}-{number}" for number in range(1, 1 + (workers or executor.room_for(size)))]
            executor.graph(dict.fromkeys(names), partial(_join, asked, _reached(target)), workers=0,
                           done=lambda name, result: None, room=target.logs, asks=dict.fromkeys(names, executor.ask(size)))
        bench = _bench(asked.plan, inputs)
        _try(bench, space, study, asked.trials, quiet=quiet)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; {len(complete(study))} finished trials are kept in {target.name}",
                                "the same command with --resume continues") from stop
    return _finish(asked.plan, target, study, bench, space, overwrite=overwrite or resume)


def _reached(target: _Target) -> Any:
    """The study as a worker reaches it: its file on a shared disk, or a desk on this machine."""
    if isinstance(target.logs, Path):
        return target.study.absolute()
    from paft.executor.desk import Desk
    from paft.search.journal import Far, Keeper

    return Far(Desk.open(partial(Keeper, target.study)))


@dataclass(frozen=True)
class _Settings:
    """What may be tried."""

    methods: Sequence[str] | None
    ranges: Mapping[str, tuple[float, float]] | None
    groups: int
    seed: int


@dataclass(frozen=True)
class _Asked:
    """What is asked for, as every process that joins the search must have it."""

    plan: Plan
    settings: _Settings
    trials: int

    def space(self) -> tuple[Inputs, Space]:
        plan, said = self.plan, self.settings
        inputs = open_inputs(plan.adapters, plan.base, weights=True)
        return inputs, make_space(inputs, plan.adapters, plan.base or inputs.reference, chosen=said.methods, ranges=said.ranges,
                                  groups=said.groups, seed=said.seed)

    def study(self, inputs: Inputs, space: Space, place: Any, *, resume: bool, name: str = "") -> Any:
        from paft.search.study import Seeded, open_study

        return open_study(place, Seeded(space.seed, space.anchors()), _about(self.plan, inputs, space), resume=resume, name=name)


def _join(asked: _Asked, place: Any, name: str) -> None:
    """In a worker: take part in the study until it has its trials."""
    inputs, space = asked.space()
    _try(_bench(asked.plan, inputs), space, asked.study(inputs, space, place, resume=True), asked.trials)


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


def _finish(plan: Plan, target: _Target, study: Any, bench: _Bench, space: Space, *, overwrite: bool) -> dict[str, Any]:
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
              "nearest": min(rows, key=lambda row: row["validation_ideal"])["point"], "study": target.name,
              "front": rows, "others": others,
              "rows": {name: {key: len(some) for key, some in vars(held).items()}
                       for name, held in (("validation", plan.validation), ("test", plan.test))},
              "all": [{"trial": one.number, "recipe": one.user_attrs["recipe"], **one.user_attrs["scores"]} for one in trials]}
    inputs = bench.inputs
    hashes = [{"name": name, "content_sha256": d.content_hash} for name, d in zip(inputs.names, inputs.deltas, strict=True)]
    turn = target.study.with_name(f".{target.study.name}.turn")  # the others of this study write the same
    with turn_at(turn, quiet=True), provenance.output_dir(target.out, overwrite=overwrite) as scratch:
        write_recipes(scratch, rows, front)
        front_figure(scratch / "front.png", trials, rows, others)
        (scratch / "front.json").write_text(provenance.to_json(report), encoding="utf-8")
        provenance.write_manifest(scratch, command="paft search", recipe=_about(plan, inputs, space), seed=space.seed,
                                  inputs=hashes, base={"name": inputs.base_name})
    return report | {"out": str(target.out)}


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
