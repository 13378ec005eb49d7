"""`paft merge` and its files: flags go before what a file says, errors point at lines, the plan fits a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory

from paft.cli import invoke
from paft.cli.mergefile import profile_lines
from paft.errors import UsageError
from paft.recipe import RunRecipe, validate
from paft.runplan import check


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def recipe(world: World, text: str) -> list[str]:
    file = world.folder / "mine.yaml"
    file.write_text(text.replace("@one", str(world.one)).replace("@two", str(world.two)).replace("@base", str(world.base)))
    return ["merge", "-c", str(file), "-o", str(world.out)]


OURS = """kind: merge
method: ties
adapters:
  - adapter: @one
    weight: 0.5
    density: [0.2, 0.8]
  - {adapter: @two, weight: 2}
parameters:
  density: 0.9
"""
MERGEKIT = """merge_method: task_arithmetic
base_model: @base
models:
  - model: @base+@one
    parameters: {weight: 0.5, density: 0.3}
  - model: @base+@two
parameters:
  weight: 2
dtype: bfloat16
"""


def plan(arguments: list[str], capsys: Capture) -> dict[str, Any]:
    assert invoke([*arguments, "--dry-run", "--json", "-q"]) == 0
    return json.loads(capsys.readouterr().out)["recipe"]


def test_flags_go_before_what_an_entry_says(world: World, capsys: Capture) -> None:
    for text in (OURS, MERGEKIT.replace("task_arithmetic", "ties")):
        arguments = recipe(world, text)
        found = plan([*arguments, "-p", "density=0.4", "--weights", "1,3"], capsys)
        assert found["weights"] == [1.0, 3.0] and found["parameters"]["density"] == 0.4
        assert all(isinstance(entry, str) for entry in found["adapters"])
        found = plan([*arguments, "-p", "weight={gradient: [0, 1]}", "--dtype", "float16", "--seed", "3"], capsys)
        assert found["weights"] is None and found["parameters"]["weight"] == {"gradient": [0, 1]}
        assert (found["dtype"], found["seed"]) == ("float16", 3)


def test_a_file_with_settings_for_its_adapters_takes_no_others(world: World, capsys: Capture) -> None:
    arguments = [*recipe(world, OURS), str(world.one), str(world.two)]
    assert_one_error(capsys, invoke(arguments), 2, "mine.yaml:3: this file says how to merge its own adapters")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    density: [", "    densty: [", "mine.yaml:6: ties has no 'densty' of one adapter"),
        ("[0.2, 0.8]", "[0.2, much]", "mine.yaml:6: density='much' does not fit"),
        ("  density: 0.9", "  density: [{filter: mlp, vale: 0.9}]", "mine.yaml:9: a condition has no 'vale'"),
        ("  density: 0.9", "  lambda: [1, 2]", "mine.yaml:9: lambda is one for the whole merge"),
        ("  density: 0.9", "  density: {layers: 1-2, value: 0.5}", "mine.yaml:9: layers 1-2: the base has layers 0 to 1"),
        ("  density: 0.9", "  density: {filter: mpl, value: 0.5}", "mine.yaml:9: filter 'mpl' is in no tensor's name"),
        ("[0.2, 0.8]", "[0.2, 1.8]", "layers.1.mlp.down_proj.weight: density must be in (0, 1]"),
        ("weight: 2", "weight: {filter: mlp, value: 2}", "mine.yaml:7: no weight applies to model.layers.0.self_attn"),
        ("weight: 2", "weigth: 2", "mine.yaml:7: ties has no 'weigth'"),
        ("- {adapter: @two,", "- {adaptr: @two,", "mine.yaml:7: adapters.1 names no adapter"),
    ],
)
def test_a_bad_setting_is_told_with_its_line(world: World, capsys: Capture, old: str, new: str, said: str) -> None:
    assert old in OURS
    for more in ([], ["--dry-run"]):
        assert_one_error(capsys, invoke([*recipe(world, OURS.replace(old, new)), *more]), 2, said)
    assert not world.out.exists()


def test_a_bad_flag_is_blamed_itself(world: World, capsys: Capture) -> None:
    arguments = [*recipe(world, OURS), "-p", "density={layers: 7, value: 0.5}"]
    assert_one_error(capsys, invoke(arguments), 2, "-p density={layers: 7, value: 0.5}: layers 7")
    arguments = [*recipe(world, OURS), "--set", "parameters.density={layers: 7, value: 0.5}"]
    assert_one_error(capsys, invoke(arguments), 2, "--set parameters.density={layers: 7, value: 0.5}: layers 7")


def test_notes_go_to_stderr_unless_quiet(world: World, capsys: Capture) -> None:
    arguments = [*recipe(world, MERGEKIT), "--dry-run"]
    assert invoke(arguments) == 0
    assert capsys.readouterr().err.strip().endswith("mine.yaml:5: density has no effect on task_arithmetic")
    assert invoke([*arguments, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_the_plan_shows_what_varies_in_eighty_columns(world: World, capsys: Capture) -> None:
    assert invoke([*recipe(world, OURS), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["by", "layer", "0", "1"] and lines[2].split() == ["density", "of", "adapter", "#1", "0.2", "0.8"]
    wide = {"columns": [f"{i}0-{i}9" for i in range(6)],
            "rows": [{"what": f"density of {'x' * 60}", "where": "mlp", "values": [0.123456] * 5 + [None]}] * 20}
    lines = profile_lines(wide)
    assert len(lines) == 10 and all(len(line) < 80 for line in lines) and lines[-1] == "and 12 more rows (--json shows all)"
    assert lines[1].endswith("0.123")


def test_the_result_of_many_adapters_fits_eighty_columns(world: World, capsys: Capture, make_adapter: AdapterFactory) -> None:
    names = [f"llama-8b-instruct-sft-{i}" for i in range(5)]
    for seed, name in enumerate(names):
        make_adapter(world.base, seed + 10).rename(world.folder / name)
    assert invoke(["merge", *(str(world.folder / name) for name in names), "-o", str(world.out), "-q"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if str(world.out) not in line]
    assert all(len(line) < 80 for line in lines)
    assert all(f"{name} 100%" in " ".join(line.strip() for line in lines) for name in names)


def test_a_recipe_may_choose_its_engine(world: World, capsys: Capture) -> None:
    arguments = recipe(world, "kind: merge\nengine: mergekit\nmethod: passthrough\nadapters: [@one]\n")
    assert plan(arguments, capsys)["engine"] == "mergekit"
    assert_one_error(capsys, invoke([*arguments, "--engine", "paft"]), 2, "there is no merge method 'passthrough'")


def test_the_merges_of_a_pipeline_may_vary_over_depth_too() -> None:
    data = {"name": "a", "model": "demo", "data": {"sft": "demo:sft", "pref": "demo:pref"}}
    data |= {"train": {"one": {"objective": "sft"}}}
    merge = {"of": ["one"], "method": "ties", "parameters": {"density": {"gradient": [0.2, 0.8]}}}
    check(validate(RunRecipe, {**data, "merge": {"x": merge}}))
    for parameters in ({"density": {"gradent": [1]}}, {"densty": 1}):
        with pytest.raises(UsageError, match=r"merge\.x: "):
            check(validate(RunRecipe, {**data, "merge": {"x": merge | {"parameters": parameters}}}))
