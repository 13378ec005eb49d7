"""Ways of methods and scores of named tasks over the seeds of a run, against numbers by hand."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from comparekit import LOSSES, PIPELINE, Point, moved, run
from datakit import write_jsonl
from test_report_page import ODD, SCHEMA, checked, keys

from paft.cli import invoke
from paft.compare import told, write
from paft.report.headtohead import front
from paft.report.seeds import Study, study
from paft.report.seeds_tables import short_tables, tables, to_csv
from paft.report.trajectory import ways_figure
from paft.report.ways import ways

SEQUENCES = ("sft-dpo", "dpo-sft", "dpo-sft-l1")


def way_of(seed: int, steps: tuple[int, ...] = (0, 20, 40)) -> dict[int, Point]:
    return {step: (9.0 - 0.15 * step + 0.1 * seed, 0.7 - 0.01 * step - 0.02 * seed) for step in steps}


def gone(folder: Path, count: int = 3, *, steps: dict[int, tuple[int, ...]] | None = None, **more: Any) -> Study:
    """Runs in which Mix has been measured on its way; ``steps`` of a seed in place of the usual ones."""
    places = [run(folder / f"seed-{seed}", seed, moved(seed), **more) for seed in range(count)]
    for seed, place in enumerate(places):
        found = way_of(seed, *([steps[seed]] if steps and seed in steps else []))
        write_jsonl(place / "adapters" / "mix" / "log.jsonl", [
            {"step": step, "loss": 1.0, "eval_loss": 1.0, "eval_sft_loss": sft, "eval_dpo_loss": dpo}
            for step, (sft, dpo) in found.items()])
    return study(places)


def close(one: Any, two: Any) -> bool:
    return [list(map(float, point)) for point in one] == [pytest.approx(list(point)) for point in two]


def test_a_sequence_goes_over_the_rows_of_its_stages(tmp_path: Path) -> None:
    found = {way.row: way for way in ways(gone(tmp_path))}
    assert list(found) == [*SEQUENCES, "mix"]
    for name, stage in (("sft-dpo", "sft"), ("dpo-sft", "dpo"), ("dpo-sft-l1", "dpo")):
        by_hand = [tuple(statistics.mean(moved(seed)[row][i] for seed in range(3)) for i in (0, 1))
                   for row in ("base", stage, name)]
        assert close(found[name].points, by_hand) and found[name].split == "test" and found[name].steps == (0, 1, 2)


def test_the_way_of_a_training_is_the_mean_at_equal_steps(tmp_path: Path) -> None:
    def mix(which: Study) -> Any:
        return {way.row: way for way in ways(which)}.get("mix")

    found = mix(gone(tmp_path / "a"))
    by_hand = [tuple(statistics.mean(way_of(seed)[step][i] for seed in range(3)) for i in (0, 1)) for step in (0, 20, 40)]
    assert close(found.points, by_hand) and (found.steps, found.split) == ((0, 20, 40), "validation")
    assert mix(gone(tmp_path / "b", steps={1: (0, 15, 40)})).steps == (0, 40)  # one stopped early, say, or was resumed
    assert mix(gone(tmp_path / "c", steps={2: (5,)})) is None
    assert [way.row for way in ways(study([run(tmp_path / "d", 0, LOSSES)]))] == list(SEQUENCES)


def test_evaluations_on_the_way_are_no_cost_of_training(tmp_path: Path) -> None:
    """Those of the trainings that estimated f* neither; their training is."""
    place = run(tmp_path / "r", 0, LOSSES)
    mix, before = place / "adapters" / "mix", study([place]).runs[0].costs["mix"]["seconds"]
    manifest = json.loads((mix / "paft.json").read_text())
    (mix / "paft.json").write_text(json.dumps({**manifest, "optima": {"path": "optima-1"}}))
    for log in (mix, mix.parent / "optima-1" / "sft", mix.parent / "optima-1" / "dpo"):
        log.mkdir(parents=True, exist_ok=True)
        write_jsonl(log / "log.jsonl", [{"step": step, "evaluation_seconds": step / 2} for step in (0, 1, 2, 4)])
    assert study([place]).runs[0].costs["mix"]["seconds"] == before - 3 * 2.0


def test_the_figure_shows_every_way_the_front_and_the_ideal_point(tmp_path: Path) -> None:
    found = gone(tmp_path)
    rows = found.rows()
    axes, = ways_figure(rows, ways(found), "t").axes
    lines = {(line.get_linestyle(), line.get_marker()): line for line in axes.lines}
    solid = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "-"]
    assert all(close(drawn, way.points) for drawn, way in zip(solid, ways(found), strict=True))
    ends = {row["id"]: (row["sft_loss"], row["dpo_loss"]) for row in rows}
    star, = lines[("None", "*")].get_xydata()
    assert tuple(star) == pytest.approx((min(x for x, _ in ends.values()), min(y for _, y in ends.values())))
    dashed, = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert close(dashed.get_xydata(), front(ends.values()))
    dotted = [line.get_xydata() for line in axes.lines if line.get_linestyle() == ":"]
    assert close(dotted[-1], [ways(found)[-1].points[-1], ends["mix"]])
    drawn = {tuple(map(float, point)) for line in axes.lines for point in line.get_xydata()}
    assert set(ends.values()) <= drawn


def test_page_json_and_command_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gone(tmp_path, names={"mix": ODD, "sft-dpo": "$x_1$"})
    data = write(found, out := tmp_path / "out")
    page = checked(out / "compare.html")
    assert page.tags.count("svg") == 3 and "validation split" in page.text and (out / "compare-ways.png").stat().st_size > 0
    assert [way["id"] for way in data["ways"]] == [*SEQUENCES, "mix"]
    assert data["ways"][-1]["points"][1]["step"] == 20
    staged = write(study([run(tmp_path / "s", 0, LOSSES)]), tmp_path / "staged")
    assert "validation split" not in checked(tmp_path / "staged" / "compare.html").text and len(staged["ways"]) == 3
    assert invoke(["compare", *(str(each.path) for each in found.runs), "-o", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  compare.png, compare-ways.png"


def test_without_any_way_there_is_no_figure_of_them(tmp_path: Path) -> None:
    alone = {**PIPELINE, "train": {name: PIPELINE["train"][name] for name in ("sft", "dpo")}, "merge": {}}
    losses = {name: LOSSES[name] for name in ("base", "sft", "dpo")}
    data = write(study([run(tmp_path / "a", 0, losses, alone)]), tmp_path / "out")
    assert data["ways"] == [] and not (tmp_path / "out" / "compare-ways.png").exists()


# Named tasks


def asked(folder: Path) -> Study:
    """Three seeds; `quiz` was asked of sft and ties."""
    places = [run(folder / f"seed-{seed}", seed, moved(seed)) for seed in range(3)]
    for seed, place in enumerate(places):
        report = json.loads((place / "report.json").read_text())
        for row in report["rows"]:
            if row["id"] in ("sft", "ties"):
                row |= {"quiz": 0.5 + 0.1 * seed, "quiz_stderr": 0.3, "tasks": {"quiz": {"metric": "acc", "acc": 0.5, "rows": 9,
                                                                                       "shots": 2}}}
        (place / "report.json").write_text(json.dumps(report))
    return study(places)


def test_scores_of_tasks_are_means_over_the_seeds(tmp_path: Path) -> None:
    found = asked(tmp_path)
    rows = {row["id"]: row for row in found.rows()}
    assert (rows["ties"]["quiz"], rows["ties"]["quiz_se"]) == pytest.approx((0.6, 0.1 / math.sqrt(3)))
    assert {name for name, row in rows.items() if "quiz" in row} == {"sft", "ties"}
    assert not [key for row in rows.values() for key in row if "stderr" in key]


def test_they_are_columns_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(tmp_path)
    data = write(found, out := tmp_path / "out")
    assert data == told(found, found.rows())
    column, = [column for column in tables(found, found.rows())[0][2] if column.key == "quiz"]
    assert column.help == "lm-eval: acc, 2 shots, 9 rows" and column.show(found.rows()[1]) == "0.600 ± 0.058"
    title, rows, columns = short_tables(found, found.rows())[1]
    assert title.startswith("Named tasks") and [row["id"] for row in rows] == ["sft", "ties"]
    assert [column.key for column in columns] == ["name", "quiz"]
    assert "0.600 ± 0.058" in (out / "compare.md").read_text() and "0.600 ± 0.058" in checked(out / "compare.html").text
    read = {each["id"]: each for each in csv.DictReader(to_csv(found.rows()).splitlines())}
    assert float(read["ties"]["quiz"]) == pytest.approx(0.6) and read["dpo"]["quiz"] == ""
    stored = json.loads((out / "compare.json").read_text())
    assert [row["quiz"] for row in stored["rows"] if "quiz" in row] == pytest.approx([0.6, 0.6])
    capsys.readouterr()
    assert invoke(["compare", *(str(run.path) for run in found.runs)]) == 0
    out_lines = capsys.readouterr().out.splitlines()
    assert any("Named tasks" in line for line in out_lines) and max(map(len, out_lines)) <= 80


def test_every_key_of_a_way_is_documented(tmp_path: Path) -> None:
    found = gone(tmp_path)
    assert not {key for key in keys(told(found, found.rows())["ways"]) if f"`{key}`" not in SCHEMA.read_text(encoding="utf-8")}
