"""Recipes: precedence, and every way to write one wrong gives one line that points at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paft.catalog import catalog, find, kind_of
from paft.errors import NotFoundError, UsageError
from paft.recipe import KINDS, DpoRecipe, MergeRecipe, RunRecipe, SftRecipe, Strict, load
from paft.yamlfile import parse_scalar, read_yaml


def refused(kind: type[Strict], text: str, tmp_path: Path, *sets: str) -> UsageError:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load(kind, file, sets)
    assert "\n" not in caught.value.message + (caught.value.hint or "")
    return caught.value


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(*[st.none() | st.floats(0, 10, allow_nan=False)] * 3)
def test_a_flag_beats_set_beats_file_beats_default(tmp_path: Path, flag: Any, by_set: Any, by_file: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("kind: train-sft\n" + (f"l1: {by_file!r}\n" if by_file is not None else ""))
    sets = () if by_set is None else (f"l1={by_set!r}",)
    expected = next((value for value in (flag, by_set, by_file) if value is not None), 0.0)
    assert load(SftRecipe, file, sets, {"l1": flag}).l1 == expected


def test_set_reaches_into_sections_and_keeps_their_other_keys(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("lora: {r: 4, alpha: 4}\ntrainer:\n")
    recipe = load(SftRecipe, file, ("lora.alpha=8", "trainer.max_steps=3", "lora.targets=[q_proj, v_proj]"))
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (4, 8, ["q_proj", "v_proj"])
    assert recipe.trainer == {"max_steps": 3}


@pytest.mark.parametrize(
    ("kind", "text", "line", "key", "hint"),
    [
        (SftRecipe, "kind: train-sft\nmodle: x\n", 2, "modle", "'model'"),
        (SftRecipe, "model: x\nlora:\n  r: 4\n  alfa: 8\n", 4, "lora.alfa", "'alpha'"),
        (DpoRecipe, "beta: 0.1\nbetta: 0.1\n", 2, "betta", "'beta'"),
        (RunRecipe, "name: a\nmodel: m\ntrain:\n  one:\n    objectiv: sft\n", 5, "train.one.objectiv", "'objective'"),
        (RunRecipe, "name: a\ndata:\n  sft:\n    train: a\n    tests: b\n", 5, "data.sft.tests", "'test'"),
        (RunRecipe, "name: a\ndefaults:\n  sft:\n    lora:\n      rank: 4\n", 5, "defaults.sft.lora.rank", "known: alpha"),
        (MergeRecipe, "parameter: {}\n", 1, "parameter", "'parameters'"),
    ],
)
def test_an_unknown_key_is_told_with_its_line(kind: type[Strict], text: str, line: int, key: str, hint: str,
                                              tmp_path: Path) -> None:
    error = refused(kind, text, tmp_path)
    assert f"recipe.yaml:{line}: unknown key {key!r}" in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("l1: -1\n", 1, "l1"),
        ("seed: 0\nl1: .inf\n", 2, "l1"),
        ("l1: true\n", 1, "l1"),
        ("eval_fraction: 1.0\n", 1, "eval_fraction"),
        ("lora:\n  r: 0\n", 2, "lora.r"),
        ("lora: 3\n", 1, "lora: should be a section"),
        ("lora:\n  targets: 3\n", 2, "lora.targets"),
        ("seed: 0.5\n", 1, "seed"),
        ("model: 7\n", 1, "model"),
    ],
)
def test_a_bad_value_is_told_with_its_line(text: str, line: int, said: str, tmp_path: Path) -> None:
    error = refused(SftRecipe, text, tmp_path)
    assert f"recipe.yaml:{line}: {said}" in error.message


def test_a_bad_value_of_set_or_flag_is_blamed_on_it(tmp_path: Path) -> None:
    assert refused(SftRecipe, "l1: 0.1\n", tmp_path, "l1=-1").message.startswith("--set l1=-1: l1")
    assert refused(SftRecipe, "lora: {r: 3}\n", tmp_path, "lora={r: 0}").message.startswith("--set lora={r: 0}: lora.r")
    with pytest.raises(UsageError, match="--dtype: dtype"):
        load(MergeRecipe, None, (), {"dtype": "int8"})


@pytest.mark.parametrize("item", ["l1", "=1", "a..b=1", ".l1=1", "l1=[", "l1='", "model.x=1", "l1=*a", "l1=&"])
def test_a_malformed_set_is_refused(item: str, tmp_path: Path) -> None:
    refused(SftRecipe, "model: m\n", tmp_path, item)


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    error = refused(RunRecipe, "name: a\ntrain: {}\ndata: {}\n", tmp_path)
    assert "model, data.sft, data.pref are missing" in error.message
    assert error.hint == "--set model=... --set data.sft=... --set data.pref=..."


def test_the_wrong_kind_names_the_right_command(tmp_path: Path) -> None:
    error = refused(SftRecipe, "kind: train-dpo\n", tmp_path)
    assert "'train-dpo'" in error.message and error.hint == "use `paft train-dpo ...`"
    assert "did you mean 'train-sft'" in (refused(SftRecipe, "kind: train-sfr\n", tmp_path).hint or "")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b"])
def test_the_name_of_a_run_cannot_lead_elsewhere(name: str, tmp_path: Path) -> None:
    text = f"name: {name!r}\nmodel: m\ndata: {{sft: a, pref: b}}\ntrain: {{}}\n"
    assert "recipe.yaml:1: name" in refused(RunRecipe, text, tmp_path).message


FRAGMENTS = """1: x|? [a]: b|lora: [1]|data: {sft: {train: 1}, pref: [a]}|train: {x: 3}|merge: {x: {of: a}}|defaults: {sft: 3}
    |lora: {targets: {a: 1}}|~: 1|kind: [1]|kind: 3|evaluate: {split: tes}|adapters: a|weights: [1, a]|<<: {a: 1}|'': 1
    |train: {1: {objective: sft}}|merge: {x: {of: [1], method: ties, foo: 1}}|seed: {}|name: [a]|trainer: []""".split("|")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(list(KINDS.values())), st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=3, unique=True))
def test_no_nonsense_gets_past_or_crashes(tmp_path: Path, kind: type[Strict], lines: list[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(line.strip() for line in lines) + "\n")
    try:
        assert isinstance(load(kind, file), kind)
    except UsageError as error:
        assert "\n" not in error.message + (error.hint or "")


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("2E5", 2e5), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("0", 0), ("10", 10), ("true", True),
        ("False", False),
        ("on", "on"), ("no", "no"), ("yes", "yes"), ("null", None), ("~", None), ("", None), ("1:30", "1:30"), ("010", "010"),
        ("2026-11-21", "2026-11-21"), ("1_000", "1_000"), ("0x10", "0x10"), ("e3", "e3"), ("demo:sft", "demo:sft"), ("'1'", "1"),
        ("[1, 2e0]", [1, 2.0]), ("{a: b}", {"a": "b"}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_scalar(text)
    assert found == value and type(found) is type(value)


def test_on_is_a_key_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("on: adapters/sft\n")
    assert load(SftRecipe, file).on == "adapters/sft"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: key 'a' appears twice"),
        ("a:\n  b: 1\n  b: 2\n", ":3: key 'b' appears twice"),
        ("a: [1\n", ":2: not valid YAML"),
        ("a: 1\n\tb: 2\n", ":2: not valid YAML"),
        ("- a\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: !!python/object:os.system x\n", ":1: not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("a: &x [*x]\n", "contains itself"),
    ],
)
def test_broken_yaml_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(SftRecipe, text, tmp_path).message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(NotFoundError):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(UsageError):
        read_yaml(tmp_path / "latin.yaml")


# The catalogue


def test_names_and_paths_find_recipes(tmp_path: Path) -> None:
    assert find("demo") == catalog()["demo"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: merge\n")
    assert find(str(mine)) == mine and kind_of(mine) == "merge"
    with pytest.raises(NotFoundError) as caught:
        find("demmo")
    assert caught.value.hint == "did you mean 'demo'?"
    mine.write_text("kind: cake\n")
    with pytest.raises(UsageError, match="no known kind"):
        kind_of(mine)
