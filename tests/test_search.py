"""A search: its trials, their order and resumption, the front, and that its recipes are what was scored."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

from paft import data
from paft.errors import MismatchError, ResourceError, UsageError
from paft.evaluate import Evaluator, Held
from paft.merge.engine import merge
from paft.merge.inputs import open_inputs
from paft.merge.resident import open_job
from paft.models import load_model, load_tokenizer
from paft.recipe import MergeRecipe, load
from paft.search import search as module
from paft.search.front import front_of, rows_of
from paft.search.search import Plan, search
from paft.search.space import make_space, parted
from paft.search.study import Seeded, complete, open_study, run_trials


@pytest.fixture(scope="module")
def plan(tiny_base: Path, make_adapter: AdapterFactory, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("data")
    sft = data.load_rows(str(write_jsonl(folder / "sft.jsonl", chat_rows(12))), "sft")
    pref = data.load_rows(str(write_jsonl(folder / "pref.jsonl", pair_rows(12))), "pref")
    adapters = tuple(str(make_adapter(tiny_base, seed)) for seed in (1, 2))
    return Plan(adapters, str(tiny_base), Held(sft[:6], pref[:6], []), Held(sft[6:], pref[6:], []))


@pytest.fixture(scope="module")
def found(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("search")
    return search(plan, folder / "out", folder / "study.db", trials=14, groups=2, quiet=True)


# A study without a model: the objective is a function of the numbers


def losses(trial: Any) -> tuple[float, float]:
    numbers = {key: trial.suggest_float(key, 0.0, 2.0) for key in ("x", "y")}
    if trial.suggest_categorical("method", ["one", "two"]) == "two":
        numbers["x"] += trial.suggest_float("z", 0.0, 1.0)
    return numbers["x"] ** 2 + numbers["y"] ** 2, (numbers["x"] - 1) ** 2 + numbers["y"] ** 2


ANCHORS = [{"x": 0.0, "y": 0.0, "method": "one"}, {"x": 1.0, "y": 0.0, "method": "two", "z": 0.5}]


def study_in(file: Path, seed: int = 0, *, resume: bool = False, about: str = "this") -> Any:
    return open_study(file, Seeded(seed, ANCHORS), {"about": about}, resume=resume)


def trace(study: Any) -> list[Any]:
    return [(trial.params, trial.values) for trial in complete(study)]


@pytest.mark.parametrize("suffix", [".db", ".journal"])
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(suffix: str, tmp_path: Path) -> None:
    whole = study_in(tmp_path / f"whole{suffix}")
    run_trials(whole, 26, losses, quiet=True)  # TPE begins at the 11th

    def stopped(trial: Any) -> tuple[float, float]:
        if trial.number == 17:
            trial.suggest_float("x", 0.0, 2.0)
            raise KeyboardInterrupt
        return losses(trial)

    with pytest.raises(KeyboardInterrupt):
        run_trials(study_in(tmp_path / f"part{suffix}"), 26, stopped, quiet=True)
    part = study_in(tmp_path / f"part{suffix}", resume=True)
    assert len(complete(part)) == 17
    run_trials(part, 26, losses, quiet=True)
    assert trace(part) == trace(whole)
    other = study_in(tmp_path / f"other{suffix}", seed=1)
    run_trials(other, 3, losses, quiet=True)
    assert trace(other)[:2] == trace(whole)[:2] and trace(other)[2] != trace(whole)[2]


def test_processes_share_a_study(tmp_path: Path) -> None:
    """Two that ask before either tells draw different numbers, and the anchors are tried once."""
    one, two = study_in(tmp_path / "s.db"), study_in(tmp_path / "s.db", resume=True)
    for _ in range(4):
        trials = [(study, study.ask()) for study in (one, two)]
        for study, trial in trials:
            study.tell(trial, losses(trial))
    drawn = [params for params, _ in trace(one)]
    assert len(drawn) == 8 == len({json.dumps(params, sort_keys=True) for params in drawn})
    assert drawn[:2] == ANCHORS
    run_trials(two, 8, losses, quiet=True)
    assert len(complete(one)) == 8


def test_study_files_are_refused(tmp_path: Path) -> None:
    study_in(tmp_path / "s.db")
    with pytest.raises(MismatchError, match="exists"):
        study_in(tmp_path / "s.db")
    with pytest.raises(MismatchError, match="another about"):
        study_in(tmp_path / "s.db", resume=True, about="that")
    with pytest.raises(UsageError, match="no study's name"):
        study_in(tmp_path / "s.sqlite3")
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(MismatchError, match="no study of paft"):
        study_in(tmp_path / "text.db", resume=True)
    with pytest.raises(MismatchError, match="losses are nan"):
        run_trials(study_in(tmp_path / "s.db", resume=True), 1, lambda trial: (float("nan"), 1.0), quiet=True)


def test_the_front_is_what_no_other_beats() -> None:
    draw = random.Random(0)
    trials = [SimpleNamespace(number=i, values=[draw.randint(0, 6), draw.randint(0, 6)]) for i in range(30)]

    def beaten(one: Any) -> bool:
        return any(all(a <= b for a, b in zip(other.values, one.values, strict=True)) and other.values != one.values
                   for other in trials)

    wanted = {tuple(one.values) for one in trials if not beaten(one)}
    front = front_of(trials)
    assert [tuple(one.values) for one in front] == sorted(wanted)
    assert all(one.number == min(t.number for t in trials if t.values == one.values) for one in front)


def test_points_are_chosen_by_validation_and_told_by_test() -> None:
    recipe = {"method": "ties", "weights": [1.0, 0.5], "parameters": {"density": [0.5, 0.2]}, "adapters": ["a", "b"]}
    values, tested = [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], [[1.0, 1.0], [2.0, 2.0], [3.0, 0.5]]
    chosen, told = ([dict(zip(("sft_loss", "dpo_loss"), pair, strict=True)) for pair in pairs] for pairs in (values, tested))
    trials = [SimpleNamespace(number=i, values=pair, user_attrs={"recipe": recipe, "scores": chosen[i]})
              for i, pair in enumerate(values)]
    rows = rows_of(trials, dict(enumerate(told)))
    assert [row["kept"] for row in rows] == [True, False, True]
    assert min(rows, key=lambda row: row["validation_ideal"])["trial"] == 1
    assert rows[0]["settings"] == "1.00 0.50; density 0.50 0.20"


# A real one


def test_a_point_s_recipe_is_the_model_that_was_scored(found: dict[str, Any], plan: Plan, tmp_path: Path) -> None:
    """The written merge of the written recipe, loaded from disk, has the figures of the report."""
    base, tokenizer = load_model(str(plan.base)), load_tokenizer(str(plan.base))
    scorer = Evaluator(tokenizer, plan.test, None, plan.beta, plan.batch_size).against(base)
    assert found["others"][0] == {"point": "base", **scorer(base)}
    for row in [found["front"][0], found["front"][-1]]:
        recipe = load(MergeRecipe, Path(found["out"]) / f"{row['point']}.yaml")
        said = recipe.model_dump(include={"base", "method", "parameters", "weights", "dialect", "seed"})
        merge(recipe.adapters, **said, out=tmp_path / row["point"])
        wanted = scorer(load_model(str(tmp_path / row["point"])))
        assert {key: row[key] for key in wanted} == wanted


def test_each_adapter_alone_is_a_trial_and_a_row(found: dict[str, Any]) -> None:
    alone = [[1.0, 0.0], [0.0, 1.0]]
    for i, trial in enumerate(found["all"][:2]):
        assert [rule["value"] for rule in (one["weight"][0] for one in trial["recipe"]["adapters"])] == alone[i]
    assert found["others"][0]["point"] == "base" and len(found["others"]) == 3
    assert {row["trial"] for row in found["front"]} <= {trial["trial"] for trial in found["all"]} and found["trials"] == 14
    assert (Path(found["out"]) / "front.png").stat().st_size > 10_000


def test_a_search_repeats_itself(found: dict[str, Any], plan: Plan, tmp_path: Path) -> None:
    first = search(plan, tmp_path / "out", tmp_path / "study.db", trials=8, groups=2, quiet=True)
    assert first["all"] == found["all"][:8]
    more = search(plan, tmp_path / "out", tmp_path / "study.db", trials=14, groups=2, quiet=True, resume=True)
    assert (more["all"], more["front"]) == (found["all"], found["front"])


def test_groups_part_the_layers(plan: Plan) -> None:
    inputs = open_inputs(plan.adapters, plan.base)
    space = make_space(inputs, plan.adapters, str(plan.base), groups=2, ranges={"weight": (0.0, 3.0)})
    assert space.groups == ((0, 0), (1, 1))
    for layers, count in ((30, 4), (7, 7), (5, 2)):
        groups = [list(range(first, last + 1)) for first, last in parted(layers, count)]
        assert list(itertools.chain(*groups)) == list(range(layers)) and len(groups) == count
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    numbers = {f"weight.{i}.{g}": i + g / 10 for i, g in itertools.product(range(2), range(2))}
    job = open_job(space.recipe("task_arithmetic", numbers), inputs)
    for name in inputs.touched():
        group = int(".layers.1." in name)
        assert job.settings.at(name)[0] == pytest.approx([group / 10, 1 + group / 10])


def test_every_method_s_numbers_come_from_its_signature(plan: Plan) -> None:
    inputs = open_inputs(plan.adapters, plan.base)
    methods = ["ties", "task_arithmetic", "slerp", "breadcrumbs"]
    space = make_space(inputs, plan.adapters, str(plan.base), chosen=methods, ranges={"gamma": (0.0, 0.1)})
    weights, densities = ["weight.0", "weight.1"], ["density.0", "density.1"]
    assert space.numbers_of("ties") == [*weights, *densities, "lambda"]
    assert space.numbers_of("task_arithmetic") == weights  # the weights are its strength
    assert space.numbers_of("slerp") == ["t"]
    assert space.numbers_of("breadcrumbs") == [*weights, *densities, "gamma.0", "gamma.1"]
    for anchor in space.anchors():
        MergeRecipe.model_validate(space.recipe(anchor.pop("method"), anchor).model_dump())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ranges": {"density": (0.0, 1.0)}}, "density must be in"), ({"ranges": {"densty": (0.1, 1.0)}}, "'densty'"),
     ({"ranges": {"weight": (1.0, 1.0)}}, "empty"), ({"chosen": ["tie"]}, "no merge method"), ({"groups": 3}, "3 groups of 2")],
)
def test_spaces_are_refused_before_the_first_trial(options: dict[str, Any], said: str, plan: Plan) -> None:
    with pytest.raises(UsageError, match=said):
        make_space(open_inputs(plan.adapters, plan.base), plan.adapters, str(plan.base), **options)


def test_refusals_write_nothing(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = (tmp_path / "out", tmp_path / "study.db")
    with pytest.raises(MismatchError, match="validation rows and test rows"):
        search(replace(plan, test=plan.validation), *target, trials=2)
    with pytest.raises(UsageError, match="at least two"):
        search(replace(plan, adapters=plan.adapters[:1]), *target, trials=2)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ResourceError, match="Optuna"):
        module.check_optuna()
    assert not list(tmp_path.iterdir())


def test_recipes_are_plain_yaml(found: dict[str, Any]) -> None:
    for file in Path(found["out"]).glob("*.yaml"):
        assert file.read_text().startswith("# paft search, trial ") and yaml.safe_load(file.read_text())["kind"] == "merge"
