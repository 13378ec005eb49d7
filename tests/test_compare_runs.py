"""The seeds of a pipeline against numbers by hand: means, baselines, tax, forgetting, cost, intervals, words, files."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from comparekit import LOSSES, PIPELINE, moved, run
from test_report_page import ODD, checked

from paft.compare import told, write
from paft.errors import MismatchError, NotFoundError, PaftError, UsageError
from paft.report.paired import FEW, difference
from paft.report.seeds import Study, needed, study
from paft.report.seeds_tables import findings, l1_pairs, short_tables, tables, to_csv

ENDS = ("low", "high")


def seeds(folder: Path, count: int, **more: Any) -> Study:
    return study([run(folder / f"seed-{seed}", seed, moved(seed, **more)) for seed in range(count)])


def by_id(found: Study) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in found.rows()}


def test_means_errors_and_what_follows_from_them_by_hand(tmp_path: Path) -> None:
    found, losses = by_id(seeds(tmp_path, 4)), [moved(seed) for seed in range(4)]

    def expect(key: str, values: list[float]) -> None:
        row = found["ties"]
        assert (row[key], row[f"{key}_se"]) == pytest.approx((statistics.mean(values), statistics.stdev(values) / 2))

    ideals = [math.dist(each["ties"][:2], [min(values[i] for values in each.values()) for i in (0, 1)]) for each in losses]
    expect("sft_loss", [each["ties"][0] for each in losses])
    expect("ideal", ideals)
    expect("sft_gap", [each["ties"][0] - min(sft for sft, *_ in each.values()) for each in losses])
    expect("dpo_gap", [each["ties"][1] - min(dpo for _, dpo, _ in each.values()) for each in losses])
    expect("sft_tax", [each["ties"][0] - each["sft"][0] for each in losses])
    expect("dpo_tax", [each["ties"][1] - each["dpo"][1] for each in losses])
    expect("forgetting", [each["ties"][2] - each["base"][2] for each in losses])
    expect("seconds", [10 + 30 + 2.0 * seed for seed in range(4)])  # sft and dpo are the first and the third training
    assert (found["ties"]["tokens"], found["ties"]["memory_mb"]) == (400, 400)
    assert found["sft"]["sft_tax"] == found["dpo"]["dpo_tax"] == found["base"]["forgetting"] == 0
    assert "seconds" not in found["base"]
    assert list(found) == list(LOSSES)


def test_what_a_row_needs() -> None:
    assert needed(PIPELINE, "sft-dpo") == ["sft-dpo", "sft"]
    assert needed(PIPELINE, "pruned") == ["sft", "dpo", "sft-l1"]
    assert needed(PIPELINE, "base") == [] and needed(PIPELINE, "mix") == ["mix"]


def test_the_baselines_are_the_better_plain_order_and_dpo_alone(tmp_path: Path) -> None:
    assert seeds(tmp_path / "a", 3).baselines() == {"sequential": "dpo-sft", "dpo": "dpo"}  # not dpo-sft-l1, which is nearer
    assert seeds(tmp_path / "b", 3, sft_dpo=(1.1, 0.5, 2.0)).baselines()["sequential"] == "sft-dpo"
    without = {**PIPELINE, "train": {"sft": {"objective": "sft", "l1": 0.1}, "mix": {"objective": "joint"}}, "merge": {}}
    losses = {name: LOSSES[name] for name in ("base", "sft", "mix")}
    found = study([run(tmp_path / f"c{seed}", seed, losses, without) for seed in range(3)])
    assert found.baselines() == {} and all(row["vs"] == {} for row in found.rows())
    assert [title for title, *_ in short_tables(found, found.rows())] == ["Mean ± standard error over 3 seeds"]


def test_specialists_and_sequences_are_found_whatever_their_order(tmp_path: Path) -> None:
    train = {"l1": {"objective": "sft", "l1": 0.1}, "ties": {"objective": "dpo", "loss": {"orpo": 1.0}},
             "dpo": {"objective": "dpo"}, "dpo-sft": {"objective": "sft", "on": "dpo"},
             "sft": {"objective": "sft"}, "sft-dpo": {"objective": "dpo", "on": "l1"}, "mix": {"objective": "sft", "on": "sft"}}
    losses = {name: LOSSES.get(name, (1.0, 1.0, 1.0)) for name in ("base", "ties", "dpo", "dpo-sft", "sft", "sft-dpo", "mix")}
    found = study([run(tmp_path / "a", 0, losses, {**PIPELINE, "train": train, "merge": {}})])
    assert (found.alone("sft"), found.alone("dpo"), found.alone("joint")) == ("sft", "dpo", None)
    assert found.sequences() == ["dpo-sft"]  # not after a sparse stage, not two stages of one objective
    train["mix"] = {"objective": "joint", "method": "sequential"}
    found = study([run(tmp_path / "b", 0, losses, {**PIPELINE, "train": train, "merge": {}})])
    assert found.sequences() == ["mix", "dpo-sft"] and found.baselines()["sequential"] == "mix"


def test_intervals_are_of_differences_within_each_run(tmp_path: Path) -> None:
    found = seeds(tmp_path, 5)
    vs = by_id(found)["mix"]["vs"]
    expected = difference([a - b for a, b in zip(found.values("mix", "ideal"), found.values("dpo-sft", "ideal"), strict=True)])
    assert vs["sequential"]["ideal"] == expected.to_dict() and vs.keys() == {"sequential", "dpo"}
    assert by_id(found)["dpo"]["vs"].keys() == {"sequential"}
    pairs = found.vs(["mix", "ties"], ["dpo"], "sft_loss")
    left = [(a + b) / 2 for a, b in zip(found.values("mix", "sft_loss"), found.values("ties", "sft_loss"), strict=True)]
    assert pairs.mean == pytest.approx(statistics.mean(left) - statistics.mean(found.values("dpo", "sft_loss")))


def test_what_moves_all_rows_of_a_seed_moves_no_difference(tmp_path: Path) -> None:
    """The errors of the means grow with the spread of the seeds; the paired differences do not see it."""
    places = []
    for seed in range(5):
        losses = {name: (sft + 3 * seed, dpo + 2 * seed, text) for name, (sft, dpo, text) in LOSSES.items()}
        places.append(run(tmp_path / str(seed), seed, losses))
    row = by_id(study(places))["ties"]
    assert row["sft_loss_se"] > 1
    for metric in ("ideal", "sft_loss", "dpo_loss"):
        found = row["vs"]["sequential"][metric]
        assert found["low"] == pytest.approx(found["mean"]) and found["high"] == pytest.approx(found["mean"])


def test_the_csv_holds_every_number(tmp_path: Path) -> None:
    rows = seeds(tmp_path, 3).rows()
    read = list(csv.DictReader(to_csv(rows).splitlines()))
    assert [each["id"] for each in read] == list(LOSSES)
    for row, each in zip(rows, read, strict=True):
        numbers = {key: value for key, value in row.items() if isinstance(value, float) and not math.isnan(value)}
        assert len(numbers) >= 20 and all(float(each[key]) == value for key, value in numbers.items())
        assert each["name"] == row["name"] and each["group"] == row["group"]
        for base, metrics in row["vs"].items():
            for metric, found in metrics.items():
                assert [float(each[f"vs_{base}_{metric}_{end}"]) for end in ENDS] == [found[end] for end in ENDS]
    assert read[0]["seconds"] == "" and read[5]["vs_sequential_ideal"] == ""


@pytest.mark.parametrize(("end", "word"), [((1.0, 0.3, 1.2), "it helps"), ((3.0, 3.0, 1.2), "it harms")])
def test_words_follow_the_numbers(tmp_path: Path, end: tuple[float, ...], word: str) -> None:
    found = seeds(tmp_path, 3, ties_l1=end, dpo_sft_l1=end)
    said = findings(found, found.rows())
    pairs = {"sft-l1 in merges, beside dense SFT (1 method)": ("ties-l1", "ties"),
             "sft-l1 in merges, beside dense SFT pruned alike (1 method)": ("ties-l1", "pruned"),
             "L1 in a sequence (dpo-sft-l1 - dpo-sft)": ("dpo-sft-l1", "dpo-sft")}
    for start, (one, two) in pairs.items():
        line, = (line for line in said if line.startswith(f"{start}: "))
        assert line.endswith(f"{word}.") and f": {found.vs([one], [two], 'ideal').mean:+.2f} [" in line
    nearest = min((row for row in found.rows() if row["group"] != "base"), key=lambda row: row["ideal"])
    assert said[0].startswith(f"Nearest to the ideal point: {nearest['name']} ({nearest['group']}), {nearest['ideal']:.2f}")
    assert FEW in said[-1]


def test_merges_with_l1_are_paired_with_dense_ones_and_with_their_controls() -> None:
    train = {"sft": {}, "l1": {"l1": 0.1}, "prox": {"l1_target_sparsity": 0.5}, "l2": {"l2": 0.1}}
    merge = {"pruned": {"of": ["sft"], "method": "a", "density_like": "l1"}, "a": {"of": ["sft"], "method": "a", "weights": [2]},
             "b": {"of": ["sft"], "method": "b"},
             "a-l1": {"of": ["l1"], "method": "a"}, "a-l2": {"of": ["l2"], "method": "a", "norm_like": "l1"},
             "b-l1": {"of": ["l1"], "method": "b", "weights": [3], "norm_like": "sft"},
             "b-other": {"of": ["sft"], "method": "b", "weights": [4], "norm_like": "l1"},
             "b-shrunk": {"of": ["sft"], "method": "b", "weights": [3], "norm_like": "sft"},
             "a-prox": {"of": ["prox"], "method": "a"}, "c-l1": {"of": ["l1"], "method": "c"}}
    assert l1_pairs({"train": train, "merge": merge}) == {
        "l1/dense SFT pruned alike": [("a-l1", "pruned")], "l1/dense SFT": [("a-l1", "a"), ("b-l1", "b")],
        "l1/an L2 penalty": [("a-l1", "a-l2")], "l1/dense SFT of equal norm": [("b-l1", "b-shrunk")],
        "prox/dense SFT": [("a-prox", "a")]}


@pytest.mark.parametrize("name", ["demo", "compare"])
def test_the_shipped_recipes_give_each_method_its_controls(name: str) -> None:
    from paft.catalog import find
    from paft.recipe import RunRecipe, load

    recipe = load(RunRecipe, find(name)).model_dump()
    pairs = l1_pairs(recipe)
    counts = {len(pairs[f"sft-l1/{what}"]) for what in ("dense SFT pruned alike", "dense SFT of equal norm", "an L2 penalty")}
    assert counts == {1 if name == "demo" else 6}
    assert len(pairs["sft-l1/dense SFT"]) == 6
    for found in pairs.values():
        methods = [(recipe["merge"][one]["method"], recipe["merge"][two]["method"]) for one, two in found]
        assert all(one == two for one, two in methods) and len(set(methods)) == len(methods)


def test_an_interval_with_both_signs_claims_nothing(tmp_path: Path) -> None:
    places = [run(tmp_path / str(seed), seed, {**LOSSES, "ties-l1": (1.4, 1.1 + shift, 1.2)})
              for seed, shift in enumerate((-0.3, 0.3, 0.1))]
    said = findings(found := study(places), found.rows())
    line, = (line for line in said if line.startswith("sft-l1 in merges, beside dense SFT ("))
    assert line.endswith("no difference that these seeds could show.")


@pytest.mark.parametrize("count", [1, 3])
def test_a_skill_that_was_not_learned_is_said(tmp_path: Path, count: int) -> None:
    for what, shift, expected in (("learned", -0.2, 0), ("not", 0.1, 1)):
        sft, _, text = LOSSES["dpo"]
        ends = (sft, LOSSES["base"][1] + shift, text)
        places = [run(tmp_path / what / str(seed), seed, {**LOSSES, "dpo": ends}) for seed in range(count)]
        found = study(places)
        said = [line for line in findings(found, found.rows()) if "not better than the base" in line]
        assert len(said) == expected and all(line.startswith("dpo alone") for line in said)


def test_how_many_ways_beat_the_baselines(tmp_path: Path) -> None:
    found = seeds(tmp_path, 3)
    rows, text = found.rows(), " ".join(findings(found, found.rows()))
    signs = [(row["vs"]["sequential"]["ideal"]["low"] > 0) - (row["vs"]["sequential"]["ideal"]["high"] < 0) for row in rows
             if row["group"] in ("sequential", "joint", "merge", "control") and "sequential" in row["vs"]]
    near, far = signs.count(-1), signs.count(1)
    assert near and far
    assert f"Of 6 other ways to combine both, {near} are nearer to the ideal point than dpo-sft, {far} farther" in text
    assert "sft-dpo: SFT loss +0.48 beside SFT alone" in text and "Forgets least: ties-l1" in text


@pytest.mark.parametrize("count", [1, 2])
def test_with_fewer_than_three_seeds_no_interval_is_shown(tmp_path: Path, count: int) -> None:
    found = seeds(tmp_path, count)
    said, rows = findings(found, found.rows()), found.rows()
    assert "no interval" in said[-1] and not any("[" in line or "helps" in line or "nearer to" in line for line in said)
    assert math.isnan(rows[-1]["vs"]["dpo"]["ideal"]["low"])
    assert not any("[" in str(row) for row in short_tables(found, rows)[1][1])


@pytest.mark.parametrize(("spoil", "error", "words"), [
    (lambda place: (place / "report.json").unlink(), NotFoundError, "is not finished"),
    (lambda place: (place / "report.json").write_text("[]"), MismatchError, "is not the report of a run"),
    (lambda place: run(place / "x", 1, moved(1), {**PIPELINE, "model": "other"}), MismatchError, "another model"),
    (lambda place: run(place / "x", 0, moved(1)), MismatchError, "seed 0, and so is another"),
    (lambda place: run(place / "x", 1, {name: LOSSES[name] for name in ("base", "sft")}), MismatchError, "other rows"),
])  # fmt: skip
def test_runs_that_do_not_fit_are_refused(tmp_path: Path, spoil: Any, error: type[PaftError], words: str) -> None:
    first = run(tmp_path / "a", 0, moved(0))
    spoil(first)
    with pytest.raises(error, match=words) as caught:
        study([first, *([first / "x"] if (first / "x").exists() else [])])
    assert caught.value.hint
    with pytest.raises(UsageError):
        study([])


def test_all_is_written_and_the_page_stands_alone_with_names_as_text(tmp_path: Path) -> None:
    found = study([run(tmp_path / str(seed), seed, moved(seed), {**PIPELINE, "name": ODD}, names={"mix": ODD, "ties": "$x_1$"})
                   for seed in range(3)])
    data = write(found, out := tmp_path / "deep" / "out")
    kinds = (".md", ".json", ".csv", ".html", ".png", "-ways.png")
    assert {file.name for file in out.iterdir()} == {f"compare{kind}" for kind in kinds}
    page = checked(out / "compare.html")
    assert page.text.count(ODD) >= 4 and page.tags.count("svg") == 3 and "$x_1$" in page.text
    assert all(line in page.text for line in data["findings"])
    stored = json.loads((out / "compare.json").read_text())
    assert stored["rows"][8]["ideal"] == data["rows"][8]["ideal"] and stored["seeds"] == [0, 1, 2]
    assert stored["stages"]["dpo"] == {"seconds": 31.0, "tokens": 300.0, "memory_mb": 400.0}
    markdown = (out / "compare.md").read_text()
    assert markdown.count("\n| --- |") == len(tables(found, found.rows())) == 3 and "<script" not in markdown
    assert told(found, found.rows()) == data
