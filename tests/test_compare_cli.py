"""`paft compare` on the command line: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from clikit import Capture, assert_one_error
from comparekit import LOSSES, manifest, moved, run, training
from test_report_page import ODD, SCHEMA, checked, keys

from paft.cli import invoke

START = (8.0, 0.7)


@pytest.fixture
def trained(tmp_path: Path) -> list[str]:
    ends = [("mix", (1.3, 0.5)), ("alright", (1.6, 0.4)), ("maxright", (1.4, 0.45)), ("sequential", (2.0, 0.4))]
    made = [training(tmp_path / f"{method}-{seed}", [START, (3.0, 0.6), (sft + 0.1 * seed, dpo)], method=method, seed=seed,
                     optima={"given": {"dpo": 0.2, "sft": 1.0}}) for method, (sft, dpo) in ends for seed in range(3)]
    return [str(place) for place in made]


@pytest.fixture
def ran(tmp_path: Path) -> list[str]:
    return [str(run(tmp_path / f"run-{seed}", seed, moved(seed))) for seed in range(3)]


@pytest.mark.parametrize("what", ["trained", "ran"])
def test_tables_fit_the_terminal_and_files_are_named(what: str, request: pytest.FixtureRequest, tmp_path: Path,
                                                     capsys: Capture) -> None:
    page, figure = tmp_path / "page.html", tmp_path / "figure.svg"
    assert invoke(["compare", *request.getfixturevalue(what), "--html", str(page), "--plot", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-2])) <= 80 and lines[-2:] == [f"figure: {figure}", f"page: {page}"]
    assert not [one for one, two in pairwise(lines) if one.strip() == two.strip() == ""]
    assert figure.read_text().startswith("<?xml") and checked(page).tags.count("svg") == (1 if what == "trained" else 3)


@pytest.mark.parametrize("what", ["trained", "ran"])
def test_every_key_of_the_json_is_documented(what: str, request: pytest.FixtureRequest, capsys: Capture) -> None:
    assert invoke(["compare", *request.getfixturevalue(what), "--json"]) == 0
    data, documented = json.loads(capsys.readouterr().out), SCHEMA.read_text(encoding="utf-8")
    assert f'`"kind": "{data["kind"]}"`, `"schema": {data["schema"]}`' in documented
    found = {key.removesuffix("_se") for key in keys([{**data, "evaluations": list(data.get("evaluations", {}).values()),
                                                       "stages": list(data.get("stages", {}).values())}])}
    assert not {key for key in found - {"text_loss"} if f"`{key}`" not in documented}


def test_markdown_names_with_markup_and_dollars(tmp_path: Path, capsys: Capture) -> None:
    odd = training(tmp_path / "<b>$a_1$", [START, (1.0, 0.5)], method="mix", trainer={"note": ODD, "x": "$a_1$"})
    other = training(tmp_path / "b", [START, (1.1, 0.4)], method="mix", trainer={"note": "|", "x": 1})
    page = tmp_path / "page.html"
    assert invoke(["compare", str(odd), str(other), "--markdown", "--html", str(page), "--plot", str(tmp_path / "f.png")]) == 0
    out = capsys.readouterr().out
    assert "<script" not in out and "\\|" in out and out.startswith("| method |")
    assert ODD in checked(page).text


def test_without_evaluated_steps_of_both_there_is_still_a_table_and_a_figure(tmp_path: Path) -> None:
    from comparekit import alone

    made = [str(alone(tmp_path / "s", "train-sft", 1.2)), str(alone(tmp_path / "d", "train-dpo", 0.3))]
    assert invoke(["compare", *made, "--plot", str(tmp_path / "f.png"), "--html", str(tmp_path / "f.html")]) == 0
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_the_directories_of_estimated_optima_are_left_out(trained: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "optima-12" / "dpo").mkdir(parents=True)
    assert invoke(["compare", *trained, str(tmp_path / "optima-12"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: ") and len(json.loads(out)["rows"]) == 4
    assert_one_error(capsys, invoke(["compare", "-q", str(tmp_path / "optima-12")]), 2, "nothing to compare")


def test_refusals(trained: list[str], ran: list[str], tmp_path: Path, capsys: Capture) -> None:
    (merged := tmp_path / "merged").mkdir()
    manifest(merged, "merge", {}, 0)
    silent = training(tmp_path / "silent", [START])
    (silent / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for line, code, words in (
        ([trained[0], ran[0]], 2, "is a training and"),
        ([str(silent)], 2, "no evaluation of an objective"),
        ([str(merged)], 2, "was made by `paft merge`"),
        ([str(tmp_path / "nowhere")], 4, "neither a training nor a run"),
        ([str(tmp_path)], 4, "neither a training nor a run"),
        ([*trained, "--plot", "figure.gif"], 2, "is not a figure's name"),
        ([*trained, "-o", str(tmp_path / "out")], 2, "-o is for runs"),
        ([*ran, "--seeds", "3"], 2, "--seeds is for a recipe"),
        ([*ran, "--set", "seed=1"], 2, "--set is for a recipe"),
        ([*ran, "--dry-run"], 2, "--dry-run is for a recipe"),
        (["sft-l1"], 2, "is a 'train-sft' recipe"),
    ):
        assert_one_error(capsys, invoke(["compare", *line]), code, words)


def test_the_tables_need_no_torch(trained: list[str], ran: list[str]) -> None:
    from test_architecture import heavy_modules

    lines = [["compare", *places] for places in (trained, ran)]
    assert heavy_modules(f"from paft.cli import invoke; assert [invoke(line) for line in {lines!r}] == [0, 0]") == ""


def test_runs_are_written_where_the_user_says(ran: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert invoke(["compare", *ran, "-o", str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].endswith("compare.md, compare.json, compare.csv, compare.html,")
    assert last[1] == "  compare.png, compare-ways.png"
    assert [row["id"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]] == list(LOSSES)
