"""Compared trainings against numbers by hand: gaps, distances, costs, seeds; what rows are called; what is refused."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from comparekit import SAME_ROWS, alone, training
from datakit import chat_rows, pair_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from paft.cli import invoke
from paft.compare import kind_of, trainings
from paft.errors import MismatchError, NotFoundError, PaftError, UsageError
from paft.report.headtohead import front
from paft.report.training_tables import findings, summary

OPTIMA = {"given": {"dpo": 0.2, "sft": 1.0}}
START = (8.0, 0.7)


def rows(*places: Path) -> dict[str, dict[str, Any]]:
    return {group.label: dict(group.row) for group in trainings(places)}


def said(*places: Path) -> str:
    return " ".join(findings(trainings(places)))


def test_gaps_distances_and_costs_by_hand(tmp_path: Path) -> None:
    found = rows(training(tmp_path / "a", [START, (1.3, 0.6)], optima=OPTIMA, seconds=33, memory=550),
                 training(tmp_path / "s", [START, (2.0, 0.5)], optima=OPTIMA, method="sequential", seconds=30))
    one, other = found["ALRIGHT"], found["DPO then SFT"]
    assert (one["sft_loss"], one["dpo_loss"], one["pref_accuracy"], one["lam"]) == (1.3, 0.6, 0.6, 0.5)
    assert (one["sft_gap"], one["dpo_gap"], one["ideal"]) == pytest.approx((0.3, 0.4, 0.5))
    assert (one["seconds"], one["tokens"], one["memory_mb"], one["steps"]) == (33, 1000, 550, 2)
    assert (one["runtime_pct"], one["memory_pct"]) == pytest.approx((10.0, 10.0))
    assert other["ideal"] == pytest.approx(math.hypot(1.0, 0.3)) and "runtime_pct" not in other


def test_an_objective_below_its_optimum_is_no_distance(tmp_path: Path) -> None:
    row = rows(training(tmp_path / "a", [START, (1.3, 0.1)], optima=OPTIMA))["ALRIGHT"]
    assert (row["dpo_gap"], row["ideal"]) == pytest.approx((-0.1, 0.3))


def test_costs_are_beside_the_sequential_row_of_the_same_lambda(tmp_path: Path) -> None:
    made = [training(tmp_path / f"{method}{lam}", [START, (1.3, 0.6)], method=method, lam=lam, seconds=seconds)
            for method, lam, seconds in (("sequential", 0.2, 10), ("sequential", 0.8, 30), ("mix", 0.2, 20), ("mix", 0.8, 60),
                                         ("mix", 0.5, 40))]
    found = rows(*made)
    assert [found[f"Mix, λ {lam}"]["runtime_pct"] for lam in (0.2, 0.8, 0.5)] == pytest.approx([100, 100, 100])


def test_the_figure_draws_the_ways_the_front_and_the_ideal_point(tmp_path: Path) -> None:
    from paft.report.trajectory import training_figure

    ways = {"mix": [START, (3.0, 0.9), (1.5, 0.8)], "alright": [START, (4.0, 0.5), (2.0, 0.4)], "maxright": [START, (2.5, 0.9)]}
    groups = trainings([training(tmp_path / name, way, method=name, optima=OPTIMA, chosen="DSB") for name, way in ways.items()])
    figure = training_figure(groups)
    ways_axes, strip, *bars = figure.axes
    drawn = {line.get_linestyle(): [] for line in ways_axes.lines} | {"*": []}
    for line in ways_axes.lines:
        kind = "*" if line.get_marker() == "*" else line.get_linestyle()
        drawn[kind].append([tuple(map(float, xy)) for xy in line.get_xydata()])
    assert drawn["-"] == [list(way) for way in ways.values()]
    assert drawn["*"] == [[(1.0, 0.2)]] and drawn["--"] == [[(1.5, 0.8), (2.0, 0.4)]]
    cells = [[int(cell) for cell in image.get_array()[0]] for image in strip.images]
    assert cells == [[0, 1, 2] * (len(way) - 1) for way in ways.values()]
    assert [round(bar.get_width(), 6) for bar in bars[0].patches] == [round(group.row["ideal"], 6) for group in groups]


def test_what_gaps_are_measured_from(tmp_path: Path) -> None:
    estimated = {"estimated": {"dpo": {"step": 9.0, "held": 0.1}, "sft": {"step": 9.0, "held": 1.0}}, "path": "p"}
    own = training(tmp_path / "own", [START, (2.0, 0.4)], method="maxright", optima=estimated)
    same = training(tmp_path / "same", [START, (1.5, 0.5)], method="mix")
    other = training(tmp_path / "other", [START, (1.4, 0.9)], inputs={**SAME_ROWS, "sft_eval": "else"})
    found = rows(own, same, other)
    assert [found[name]["ideal_from"] for name in ("MAXRIGHT", "Mix", "ALRIGHT")] == [["own"], ["other"], ["table"]]
    assert found["MAXRIGHT"]["ideal"] == pytest.approx(math.hypot(1.0, 0.3))
    assert found["Mix"]["ideal"] == pytest.approx(math.hypot(0.5, 0.4))
    assert found["ALRIGHT"]["ideal"] == pytest.approx(0.5)  # the table's best: 1.4 its own, and 0.4
    assert "different held-out rows" in said(own, same, other) and "different held-out rows" not in said(own, same)
    assert "ideal" not in rows(same)["Mix"]  # a table of one has no best to be measured from


def test_the_optimum_of_the_same_seed_is_taken_first(tmp_path: Path) -> None:
    known = [training(tmp_path / f"k{seed}", [START, (2.0, 0.5)], method="maxright", seed=seed,
                      optima={"given": {"dpo": 0.1 * (seed + 1), "sft": 1.0}}) for seed in range(3)]
    mixes = [training(tmp_path / f"m{seed}", [START, (2.0, 0.5)], method="mix", seed=seed) for seed in (1, 7)]
    group = next(group for group in trainings([*known, *mixes]) if group.label == "Mix")
    assert [aim and aim.dpo for aim in group.aims] == [pytest.approx(0.2), pytest.approx(0.1)]


def test_seeds_become_one_row_and_are_paired(tmp_path: Path) -> None:
    ends, others = [(1.3, 0.6), (1.5, 0.5), (1.4, 0.8)], [(1.6, 0.7), (1.9, 0.5), (1.7, 0.9)]
    made = [training(tmp_path / f"{method}{seed}", [START, end], method=method, seed=seed, optima=OPTIMA, seconds=seconds)
            for method, several in (("alright", ends), ("sequential", others))
            for seed, (end, seconds) in enumerate(zip(several, (10, 12, 17), strict=True))]
    groups = trainings(made)
    row = groups[0].row
    ideals = [math.hypot(sft - 1.0, dpo - 0.2) for sft, dpo in ends]
    assert len(groups) == 2 and row["runs"] == 3 and row["seeds"] == [0, 1, 2]
    assert (row["ideal"], row["ideal_se"]) == pytest.approx((statistics.mean(ideals), statistics.stdev(ideals) / math.sqrt(3)))
    assert (row["seconds"], row["runtime_pct"]) == pytest.approx((13.0, 0.0))
    differences = [one - math.hypot(sft - 1.0, dpo - 0.2) for one, (sft, dpo) in zip(ideals, others, strict=True)]
    ends = f"[{min(differences):+.3f}, {max(differences):+.3f}]"  # of 27 resamples each end has 1/27 > 2.5 %
    assert f"over 3 seeds, paired: ideal distance {statistics.mean(differences):+.3f} {ends}" in said(*made)
    assert "paired" not in said(*made[:2], *made[3:])
    assert "± " in summary(groups)[1][6].show(groups[0].row)


def test_rows_are_named_by_what_differs(tmp_path: Path) -> None:
    made = [training(tmp_path / "a", [START, (1.0, 0.5)], trainer={"learning_rate": 1e-3, "max_steps": 4}),
            training(tmp_path / "b", [START, (1.1, 0.5)], trainer={"learning_rate": 2e-3, "max_steps": 4}),
            training(tmp_path / "c", [START, (1.2, 0.5)], lam=0.9),
            training(tmp_path / "d", [START, (1.2, 0.5)], method="mix", l1=1e-4),
            training(tmp_path / "e", [START, (1.2, 0.5)], method="sequential", order="sft-dpo"),
            training(tmp_path / "f", [START, (1.2, 0.5)], lam=1.0)]
    assert list(rows(*made)) == ["ALRIGHT, learning_rate 0.001", "ALRIGHT, learning_rate 0.002", "ALRIGHT", "Mix, L1",
                                 "SFT then DPO", "DPO alone"]
    assert list(rows(made[0], made[2])) == ["ALRIGHT, λ 0.5", "ALRIGHT, λ 0.9"]


def test_trainings_of_one_objective_stand_beside_joint_ones(tmp_path: Path) -> None:
    found = rows(alone(tmp_path / "s", "train-sft", 1.2), alone(tmp_path / "d", "train-dpo", 0.3),
                 alone(tmp_path / "o", "train-dpo", 5.0, loss={"ipo": 1.0}),
                 training(tmp_path / "m", [START, (1.5, 0.4)], method="mix"))
    assert found["SFT alone"]["sft_loss"] == 1.2 and "dpo_loss" not in found["SFT alone"]
    assert (found["DPO alone"]["dpo_loss"], found["DPO alone"]["pref_accuracy"]) == (0.3, 0.9)
    assert "dpo_loss" not in found["IPO alone"] and found["IPO alone"]["pref_accuracy"] == 0.9
    assert (found["SFT alone"]["seconds"], found["SFT alone"]["tokens"], found["SFT alone"]["memory_mb"]) == (9.5, 77, 400)


def test_the_end_is_the_evaluation_that_was_kept_and_the_cost_that_of_all_steps(tmp_path: Path) -> None:
    row = rows(training(tmp_path / "a", [START, (1.0, 0.5), (3.0, 0.9)], best_step=2))["ALRIGHT"]
    assert (row["sft_loss"], row["dpo_loss"], row["steps"], row["seconds"]) == (1.0, 0.5, 4, 10)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_front_dominates_all_and_nothing_on_it_is_dominated(points: list[tuple[int, int]]) -> None:
    best = front((float(x), float(y)) for x, y in points)
    assert set(best) <= set(points) and best == sorted(best)
    assert all(any(x <= px and y <= py for x, y in best) for px, py in points)
    assert not [one for one in best for two in best if one != two and two[0] <= one[0] and two[1] <= one[1]]


def test_findings_follow_the_numbers(tmp_path: Path) -> None:
    made = [training(tmp_path / "a", [START, (1.1, 0.3)], optima=OPTIMA),
            training(tmp_path / "b", [START, (1.0, 0.9)], method="mix"),
            training(tmp_path / "c", [START, (1.2, 1.0)], method="sequential", seconds=5)]
    text = said(*made)
    assert "Nearest to the ideal point: ALRIGHT, 0.141 nats away; farthest: DPO then SFT, 0.825." in text
    assert "On the Pareto front of the ends: ALRIGHT; Mix." in text and "ALRIGHT +100 % (+0 %)" in text
    assert "not in the seconds" in text and "One seed each" in text and "steps" not in text
    assert "β differs" in said(made[0], training(tmp_path / "d", [START, (1.0, 0.5)], beta=0.3))


@pytest.mark.parametrize(("spoil", "error", "told"), [
    (lambda place: (place / "log.jsonl").unlink(), NotFoundError, "log.jsonl"),
    (lambda place: (place / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n'), UsageError, "no evaluation"),
    (lambda place: (place / "log.jsonl").write_text("{\n"), MismatchError, "is not a log"),
    (lambda place: (place / "log.jsonl").write_text("[1]\n"), MismatchError, "is not a log"),
    (lambda place: (place / "paft.json").unlink(), NotFoundError, "paft.json"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path: Path, spoil: Any, error: type[PaftError], told: str) -> None:
    spoil(place := training(tmp_path / "a", [START]))
    with pytest.raises(error, match=told) as caught:
        trainings([place])
    assert caught.value.hint


def test_one_recipe_and_seed_twice_is_refused(tmp_path: Path) -> None:
    one, two = (training(tmp_path / name, [START, (1.0, 0.5)]) for name in "ab")
    with pytest.raises(MismatchError, match="a and b are of one recipe and one seed"):
        trainings([one, two])


def test_an_unfinished_training_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    with pytest.raises(NotFoundError) as caught:
        kind_of(tmp_path / "a")
    assert "--resume" in str(caught.value.hint)


def test_what_a_real_training_leaves_is_read_as_it_was_measured(tmp_path: Path, tiny_base: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    sft, pref = write_jsonl(tmp_path / "s.jsonl", chat_rows(40)), write_jsonl(tmp_path / "p.jsonl", pair_rows(40))
    for method in ("mix", "sequential"):
        assert invoke(["train-joint", "-m", str(tiny_base), "--sft-data", str(sft), "--pref-data", str(pref), "--method", method,
                       "--eval-fraction", "0.2", "--set", "trainer.max_steps=2", "--sft-opt", "0.5", "--dpo-opt", "1.1",
                       "-q", "-o", str(tmp_path / method)]) == 0
    capsys.readouterr()
    assert invoke(["compare", str(tmp_path / "mix"), str(tmp_path / "sequential"), "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    metrics = json.loads((tmp_path / "mix" / "paft.json").read_text())["metrics"]
    for ours, theirs in (("sft_loss", "eval_sft_loss"), ("dpo_gap", "eval_dpo_gap"), ("ideal", "eval_ideal_distance"),
                         ("pref_accuracy", "eval_pref_accuracy"), ("tokens", "tokens"), ("steps", "steps")):
        assert found["Mix"][ours] == pytest.approx(metrics[theirs], rel=1e-4)
    assert found["DPO then SFT"]["ideal_from"] == ["own"]
