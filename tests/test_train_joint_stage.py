"""Joint training from recipe to artefact: what it measures, keeps, estimates, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_train_resume import CLOCK, Killed, die_at, killed
from trainkit import pref_rows, sft_rows

from paft.adapter import CONFIG, WEIGHTS
from paft.errors import MismatchError, NotFoundError, UsageError
from paft.evaluate import Evaluator, Held
from paft.models import load_model, load_tokenizer, wrap
from paft.recipe import JointRecipe
from paft.train import front, work
from paft.train.stage import train

ROWS = {"sft": sft_rows(13, answer=None), "pref": pref_rows(10),
        "sft_eval": sft_rows(5, seed=9, answer=None), "pref_eval": pref_rows(7, seed=9)}
STEPS = {"max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
         "save_steps": 2, "logging_steps": 3, "eval_steps": 4}
TIMES = CLOCK | {"seconds", "evaluation_seconds", "peak_memory_mb"}


def recipe(base: Path, method: str, **fields: Any) -> JointRecipe:
    trainer = {**STEPS, **fields.pop("trainer", {})}
    said = {"lora": {"r": 3, "alpha": 6, "dropout": 0.2}, **fields}
    return JointRecipe(model=str(base), method=method, trainer=trainer, **said)  # type: ignore[arg-type]


def records(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [record for record in records(out) if "eval_loss" in record]


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mix with the L1 term": ("mix", {"l1": 1e-4}, 7),
    "alright, both sets in their third pass": ("alright", {"lam": 0.4, "trainer": {"disable_dropout": False}}, 9),
    "maxright, between two evaluations of the gaps": (
        "maxright", {"max_eval_steps": 5, "sft_opt": 4.0, "dpo_opt": 0.6, "smoothing": 0.3,
                     "trainer": {"disable_dropout": False}}, 7),
    "mix, where a pass over the pairs begins": ("mix", {"trainer": {"disable_dropout": False, "save_steps": 5}}, 8),
    "sequential, in its second phase": ("sequential", {"lam": 0.4}, 7),
    "sequential, where the second phase begins": ("sequential", {"lam": 0.5, "order": "sft-dpo"}, 6),
    "uft": ("uft", {"lam": 0.4, "l1": 1e-4}, 7),
    "uft, tokens": ("uft", {"max_tokens": 500, "lam": 0.4, "trainer": {"max_steps": -1}}, 5),
    "tokens": ("alright", {"max_tokens": 400, "trainer": {"max_steps": -1}}, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_unbroken(case: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, fields, step = CASES[case]
    made = recipe(tiny_base, method, **fields)
    train(made, tmp_path / "unbroken", rows=ROWS, quiet=True)
    with monkeypatch.context() as patch:
        die_at(step, killed, patch.setattr)
        with pytest.raises(Killed):
            train(made, tmp_path / "a", rows=ROWS, quiet=True)
    assert work.newest(tmp_path / "a.partial") is not None
    train(made, tmp_path / "a", rows=ROWS, resume=True, quiet=True)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert records(tmp_path / "a") == records(tmp_path / "unbroken")


def test_every_evaluation_measures_both_objectives(tiny_base: Path, tmp_path: Path) -> None:
    """At the start, at every ``eval_steps`` and at the end; the last is what the saved adapter scores."""
    made = recipe(tiny_base, "alright", sft_opt=3.0, dpo_opt=0.5, lam=0.3)
    manifest = train(made, tmp_path / "a", rows=ROWS, quiet=True)
    told = evaluations(tmp_path / "a")
    assert [each["step"] for each in told] == [0, 4, 8, 12]
    assert told[0]["eval_dpo_loss"] == pytest.approx(0.693147, abs=1e-6)  # the reference itself
    assert told[0]["eval_pref_accuracy"] == 0.5
    assert [len(each["chosen"]) for each in told] == [0, 4, 4, 4]
    assert [each["dpo_steps"] + each["sft_steps"] for each in told] == [0, 4, 8, 12]
    assert [each["tokens"] for each in told] == sorted({each["tokens"] for each in told})
    base, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base), chat=False)
    scorer = Evaluator(tokenizer, Held(ROWS["sft_eval"], ROWS["pref_eval"], [])).against(base)
    scores = scorer(wrap(base, tmp_path / "a"))
    last = told[-1]
    assert {key: last[f"eval_{key}"] for key in scores} == pytest.approx(scores, abs=2e-6)
    assert last["eval_loss"] == pytest.approx(0.3 * scores["dpo_loss"] + 0.7 * scores["sft_loss"], abs=1e-5)
    gaps = scores["dpo_loss"] - 0.5, scores["sft_loss"] - 3.0
    assert (last["eval_dpo_gap"], last["eval_sft_gap"]) == pytest.approx(gaps, abs=1e-5)
    assert last["eval_ideal_distance"] == pytest.approx((gaps[0] ** 2 + gaps[1] ** 2) ** 0.5, abs=1e-5)
    assert manifest["metrics"]["eval_ideal_distance"] == pytest.approx(last["eval_ideal_distance"], rel=1e-5)
    assert manifest["metrics"]["tokens"] == last["tokens"]


@pytest.mark.parametrize("fields", [{"reference": "chosen-sft"}, {"full": True}])
def test_the_reference_of_the_evaluation_is_that_of_the_training(fields: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """Before the first step the policy is the base: where the reference is another model, the DPO loss is not ln 2."""
    made = recipe(tiny_base, "alright", **{"trainer": {"learning_rate": 1e-3, "max_steps": 4}, **fields})
    train(made.model_copy(update={"reference_sft": {"learning_rate": 0.05}} if "reference" in fields else {}), tmp_path / "a",
          rows=ROWS, quiet=True)
    first = evaluations(tmp_path / "a")[0]["eval_dpo_loss"]
    assert (first == pytest.approx(0.693147, abs=1e-6)) == ("full" in fields)


def test_optima_are_estimated_once_for_all_methods(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two adapters beside the output, which other methods, λ and penalties on the same data find again, and other data do not."""
    first = train(recipe(tiny_base, "maxright", estimate_optima=True), tmp_path / "one", rows=ROWS, quiet=True)
    (place,) = tmp_path.glob("optima-*")
    assert sorted(path.name for path in place.iterdir()) == ["dpo", "sft"]
    alone = {name: evaluations(place / name) for name in ("dpo", "sft")}
    assert alone["dpo"][-1]["sft_steps"] == alone["sft"][-1]["dpo_steps"] == 0
    held = {name: min(each[f"eval_{name}_loss"] for told in alone.values() for each in told) for name in alone}
    assert {name: each["held"] for name, each in first["optima"]["estimated"].items()} == held
    gap = evaluations(tmp_path / "one")[-1]
    assert gap["eval_sft_gap"] == pytest.approx(gap["eval_sft_loss"] - held["sft"])
    times = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    second = train(recipe(tiny_base, "mix", estimate_optima=True, lam=0.2, l1=1e-4), tmp_path / "two", rows=ROWS, quiet=True)
    assert second["optima"] == first["optima"]
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == times
    train(recipe(tiny_base, "mix", estimate_optima=True), tmp_path / "three", rows={**ROWS, "sft": sft_rows(12)}, quiet=True)
    assert len(list(tmp_path.glob("optima-*"))) == 2


def test_the_reference_is_trained_once(tiny_base: Path, tmp_path: Path) -> None:
    """Not again for each of the optima, which are measured against the same one."""
    made = recipe(tiny_base, "alright", estimate_optima=True, reference="chosen-sft")
    manifest = train(made, tmp_path / "a", rows=ROWS, quiet=True)
    assert [path.parent.name for path in tmp_path.rglob("reference")] == ["a"]
    alone = [json.loads(path.read_text())["reference"] for path in tmp_path.glob("optima-*/*/paft.json")]
    assert [each["content_sha256"] for each in alone] == [manifest["reference"]["content_sha256"]] * 2


def test_it_stops_where_an_earlier_training_came_to(tiny_base: Path, tmp_path: Path) -> None:
    quick = {"eval_steps": 1, "learning_rate": 3e-2}
    train(recipe(tiny_base, "alright", trainer=quick), tmp_path / "front", rows=ROWS, quiet=True)
    points = front.read(str(tmp_path / "front"))
    made = recipe(tiny_base, "mix", stop_front=str(tmp_path / "front"), trainer=quick)
    train(made, tmp_path / "stopped", rows=ROWS, quiet=True)
    told = evaluations(tmp_path / "stopped")
    reached = [front.reached((each["eval_dpo_loss"], each["eval_sft_loss"]), points, 1e-4) for each in told]
    assert reached == [False] * (len(told) - 1) + [True]
    assert told[-1]["step"] < 12


def test_a_front_holds_no_point_that_another_one_beats(tmp_path: Path) -> None:
    points = [(0.6, 2.0), (0.5, 2.5), (0.7, 1.9), (0.65, 2.1), (0.6, 2.0)]
    for name, found in {"a": points[:3], "b": points[3:]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"eval_dpo_loss": dpo, "eval_sft_loss": sft}) for dpo, sft in found]
        (tmp_path / name / "log.jsonl").write_text("\n".join([*lines, json.dumps({"loss": 1.0})]) + "\n")
    assert front.read(str(tmp_path)) == [(0.5, 2.5), (0.6, 2.0), (0.7, 1.9)]
    assert front.reached((0.6, 2.0), [(0.6, 2.0)])
    assert not front.reached((0.6, 2.01), [(0.6, 2.0)])
    with pytest.raises(NotFoundError):
        front.read(str(tmp_path / "c"))


def test_streams_of_both_sets(tiny_base: Path, tmp_path: Path) -> None:
    files = {}
    for name in ("sft", "pref"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, ROWS[name])) + "\n")
        files[f"{name}_data"] = str(file)
    made = recipe(tiny_base, "alright", streaming=True, **files)
    train(made, tmp_path / "one", quiet=True)
    train(made, tmp_path / "two", quiet=True)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "maxright"}, "f\\* is not known"),
        ({"method": "mix", "sft_opt": 1.0}, "--sft-opt alone"),
        ({"method": "maxright", "sft_opt": 1.0, "dpo_opt": 0.1, "estimate_optima": True}, "looks for what"),
        ({"method": "alright", "loss": {"kto": 1.0}}, "loss kto is none of pairs"),
        ({"method": "alright", "loss": {"orpo": 1.0}}, "loss orpo"),
        ({"method": "sequential", "trainer": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "lr_scheduler_type"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(fields: dict[str, Any], said: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train(recipe(tiny_base, **fields), tmp_path / "a", rows=ROWS, quiet=True)
    assert not list(tmp_path.iterdir())


def test_held_out_rows_of_one_set_are_not_enough(tiny_base: Path, tmp_path: Path) -> None:
    made = recipe(tiny_base, "mix", sft_data="demo:sft", pref_data="demo:pref", sft_eval_data="demo:sft:validation")
    with pytest.raises(UsageError, match="both objectives"):
        train(made, tmp_path / "a", quiet=True)


def test_held_out_rows_are_no_training_rows(tiny_base: Path, tmp_path: Path) -> None:
    made = recipe(tiny_base, "mix", sft_data="demo:sft", pref_data="demo:pref", sft_eval_data="demo:sft",
                  pref_eval_data="demo:pref:validation")
    with pytest.raises(MismatchError, match="the same row"):
        train(made, tmp_path / "a", quiet=True)
