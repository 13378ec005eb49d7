"""`paft search` as a user meets it: adapters or a run, joined, interrupted, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

from paft.cli import invoke
from paft.provenance import write_manifest
from paft.recipe import RunRecipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def command(world: World, *more: str) -> list[str]:
    return ["search", str(world.one), str(world.two), "--sft-data", str(world.chat), "--pref-data", str(world.pairs),
            "-o", str(world.out), *more]


def test_a_front_and_a_recipe_that_merges(world: World, capsys: Capture) -> None:
    assert invoke(command(world, "--trials", "8", "--range", "weight=0:1")) == 0
    out, err = capsys.readouterr()
    assert "error" not in err and all(len(line) <= 80 or str(world.out) in line for line in out.splitlines())
    last = out.splitlines()[-1].split()
    assert last[:4] == ["next:", "paft", "merge", "-c"] and Path(last[4]).is_file()
    assert invoke(["merge", "-c", last[4], "-o", str(world.folder / "merged"), "-q"]) == 0
    report = json.loads((world.out / "front.json").read_text())
    assert report["trials"] == 8 and report["rows"]["validation"]["sft"] + report["rows"]["test"]["sft"] == 24
    assert all(0 <= weight <= 1 for trial in report["all"] for weight in trial["recipe"]["weights"])
    capsys.readouterr()
    assert_one_error(capsys, invoke(command(world, "--trials", "8")), 3, "is not empty")
    assert_one_error(capsys, invoke(command(world, "--trials", "8", "--resume")), 3, "a study with another ranges")
    assert invoke(command(world, "--trials", "9", "--range", "weight=0:1", "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["all"][:8] == report["all"]


@pytest.mark.slow
def test_two_processes_share_one_study(world: World) -> None:
    start = [sys.executable, "-m", "paft", *command(world, "--trials", "10", "--resume", "-q")]
    running = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    report = json.loads((world.out / "front.json").read_text())
    assert 10 <= report["trials"] <= 11
    drawn = [json.dumps(trial["recipe"], sort_keys=True) for trial in report["all"]]
    assert len(set(drawn)) == len(drawn)


def test_ctrl_c_keeps_finished_trials(world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from paft.evaluate import Evaluator

    calls, score = [], Evaluator.__call__

    def stopping(self: Evaluator, model: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, model)

    monkeypatch.setattr(Evaluator, "__call__", stopping)
    assert invoke(command(world, "--trials", "7", "-q")) == 130
    _, err = capsys.readouterr()
    assert "3 finished trials are kept" in err and "--resume" in err and not world.out.exists()
    assert invoke(command(world, "--trials", "7", "-q", "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 7


def finished_run(world: World) -> Path:
    """A directory as `paft run` leaves it, as far as a search looks."""
    run = world.folder / "run"
    shutil.copytree(world.one, run / "adapters" / "sft")
    shutil.copytree(world.two, run / "adapters" / "dpo")
    data = {"sft": str(write_jsonl(world.folder / "many.jsonl", chat_rows(120))),
            "pref": str(write_jsonl(world.folder / "more.jsonl", pair_rows(120)))}
    recipe = RunRecipe.model_validate({
        "name": "small", "model": str(world.base), "data": data,
        "train": {"sft": {"objective": "sft"}, "dpo": {"objective": "dpo"}, "more": {"objective": "dpo", "on": "sft"}}})
    write_manifest(run, command="run", recipe=recipe.model_dump(), seed=0)
    return run


def test_a_run_s_adapters_on_its_own_splits(world: World, capsys: Capture) -> None:
    run = finished_run(world)
    assert invoke(["search", str(run), "--trials", "6", "-q", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == str(world.folder / "run-search") and (world.folder / "run-search.db").is_file()
    assert [Path(one).name for one in report["all"][0]["recipe"]["adapters"]] == ["sft", "dpo"]
    sizes = report["rows"]
    assert 0 < sizes["validation"]["sft"] + sizes["test"]["sft"] < 60  # the run's training rows are not looked at
    assert_one_error(capsys, invoke(["search", str(run), "--of", "sft,more"]), 4, "adapters/more is not there")
    assert_one_error(capsys, invoke(["search", str(run), "--of", "sft,mor"]), 2, "trains no 'mor'")
    assert_one_error(capsys, invoke(["search", str(run), "--sft-data", str(world.chat)]), 2, "--sft-data is given")
    assert_one_error(capsys, invoke(["search", "demo", "-q"]), 4, "adapters/")


def test_refusals(world: World, capsys: Capture) -> None:
    for more, code, said in ((["--methods", "tie"], 2, "no merge method 'tie'"), (["--range", "weight"], 2, "NAME=LOW:HIGH"),
                             (["--study", str(world.folder / "s.txt")], 2, "no study's name"),
                             (["--layer-groups", "9"], 2, "9 groups of 2 layers"),
                             (["--methods", "model_stock"], 2, "no weights"),
                             (["--sft-test", str(world.chat), "--pref-test", str(world.pairs)], 3, "in validation rows and")):
        assert_one_error(capsys, invoke(command(world, *more)), code, said)
        assert not world.out.exists() and not list(world.folder.glob("*.db"))
    assert_one_error(capsys, invoke(["search", str(world.one), str(world.two)]), 2, "both objectives need held-out data")
    assert_one_error(capsys, invoke(["search", str(world.one), "--sft-data", str(world.chat), "--pref-data", str(world.pairs)]),
                     2, "at least two")
