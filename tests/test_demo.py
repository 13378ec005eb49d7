"""The embedded world end to end: each specialist learns its skill, the second stage of a sequence costs the first its own.

Which way of combining wins is for the table to say, not for a test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paft.catalog import find
from paft.cli import invoke
from paft.recipe import RunRecipe, load, validate
from paft.run import run
from paft.yamlfile import read_yaml


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SFT, DPO and DPO then SFT at full length, on the validation split; the demo's own settings."""
    data = read_yaml(find("demo")).data
    data["train"] = {name: data["train"][name] for name in ("sft", "dpo")} | {"dpo-sft": {"objective": "sft", "on": "dpo"}}
    data["merge"] = {"ties": data["merge"]["ties"]}
    data["evaluate"]["split"] = "validation"
    report = run(validate(RunRecipe, data), tmp_path_factory.mktemp("demo") / "out", quiet=True, workers=2)
    return {row["id"]: row for row in report["rows"]}


def test_the_base_knows_the_world_but_not_the_chat_frame(scores: dict[str, Any]) -> None:
    assert scores["base"]["exact_match"] == 0
    assert scores["base"]["pref_accuracy"] == 0.5
    assert scores["base"]["text_loss"] < 1.2


def test_each_specialist_learns_its_skill(scores: dict[str, Any]) -> None:
    assert scores["sft"]["exact_match"] > 0.9
    assert scores["dpo"]["pref_accuracy"] > 0.9
    assert scores["dpo"]["dpo_loss"] < 0.3


def test_sft_after_dpo_loses_preference(scores: dict[str, Any]) -> None:
    assert scores["dpo-sft"]["pref_accuracy"] < scores["dpo"]["pref_accuracy"] - 0.1


def test_a_merge_has_something_of_both(scores: dict[str, Any]) -> None:
    assert scores["ties"]["sft_loss"] < scores["dpo"]["sft_loss"]
    assert scores["ties"]["dpo_loss"] < scores["sft"]["dpo_loss"]


def test_the_demo_recipe_at_reduced_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    short = [f"defaults.{objective}.trainer.max_steps=2" for objective in ("sft", "dpo", "joint")]
    small = ["evaluate.rows=8", "evaluate.generate=4", *short]
    out = Path("merges/demo")
    assert invoke(["run", "demo", "-o", str(out), "--workers", "1", *(word for item in small for word in ("--set", item))]) == 0
    told = capsys.readouterr()
    recipe = load(RunRecipe, find("demo"))
    report = json.loads((out / "report.json").read_text())
    assert [row["id"] for row in report["rows"]] == ["base", *recipe.train, *recipe.merge]
    assert [line for part in (told.out, told.err) for line in part.splitlines() if len(line.rstrip()) > 80] == []
    assert "next: paft" in told.out
    assert {"report.md", "tradeoff.png", "sparsity.png", "paft.json"} <= {path.name for path in out.iterdir()}
