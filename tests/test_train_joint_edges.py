"""Joint training at the edges of what can be asked: data of a few rows or of two kinds, budgets of tokens, epochs, a bad stop."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from datakit import write_jsonl
from test_train_joint_stage import ROWS, evaluations, recipe, records
from test_train_resume import Killed, die_at, killed
from trainkit import pref_rows, sft_rows

from paft.adapter import WEIGHTS
from paft.errors import MismatchError, NotFoundError, PaftError, UsageError
from paft.train import term, work
from paft.train.losses import unpair
from paft.train.stage import plan, train

PAIRS = pref_rows(40)
SCORES = [{**row, "label": 0.3} for row in unpair(pref_rows(20, seed=3))]


def files(folder: Path, feedback: list[Any], sft: int = 40) -> dict[str, str]:
    return {"sft_data": str(write_jsonl(folder / "sft.jsonl", sft_rows(sft))),
            "pref_data": str(write_jsonl(folder / "pref.jsonl", feedback))}


def test_feedback_of_pairs_is_held_out_and_estimated_as_pairs(tiny_base: Path, tmp_path: Path) -> None:
    """UFT reads a pair as two rows, and the DPO loss of held-out pairs and of the training of DPO alone needs them whole."""
    made = recipe(tiny_base, "uft", estimate_optima=True, eval_fraction=0.3, **files(tmp_path, PAIRS),
                  trainer={"max_steps": 4, "eval_steps": 2})
    train(made, tmp_path / "a", quiet=True)
    assert {"eval_dpo_gap", "eval_ideal_distance"} <= evaluations(tmp_path / "a")[-1].keys()


@pytest.mark.parametrize(("fields", "said"), [({"eval_fraction": 0.3}, "held-out feedback is no pairs"),
                                              ({"estimate_optima": True}, "labels or scores")])
def test_scores_have_no_dpo_loss(fields: dict[str, Any], said: str, tiny_base: Path, tmp_path: Path) -> None:
    """Said before any work, by --dry-run too."""
    made = recipe(tiny_base, "uft", **fields, **files(tmp_path, SCORES))
    for run in (plan, train):
        with pytest.raises(UsageError, match=said):
            run(made, tmp_path / "a", quiet=True)


def test_pairs_and_scores_in_one_set(tiny_base: Path, tmp_path: Path) -> None:
    made = recipe(tiny_base, "uft", lam=1.0, **files(tmp_path, [*PAIRS[:3], *SCORES[:4]]), trainer={
        "max_steps": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1})
    assert train(made, tmp_path / "a", quiet=True)["metrics"]["steps"] == 2 * 3 + 4


@pytest.mark.parametrize("steps", [-1, 3])
def test_fewer_rows_than_a_whole_batch_are_refused(steps: int, tiny_base: Path, tmp_path: Path) -> None:
    """They would be looked for without end."""
    made = recipe(tiny_base, "alright", lam=0.0, **files(tmp_path, PAIRS, sft=3), trainer={
        "max_steps": steps, "per_device_train_batch_size": 4, "dataloader_drop_last": True})
    with pytest.raises(MismatchError, match="makes no batch"):
        train(made, tmp_path / "a", quiet=True)
    assert not list(tmp_path.glob("a*"))


def test_the_plan_counts_whole_batches_where_others_are_dropped(tiny_base: Path, tmp_path: Path) -> None:
    made = recipe(tiny_base, "alright", **files(tmp_path, PAIRS[:11], sft=7), trainer={
        "max_steps": -1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "dataloader_drop_last": True})
    steps = plan(made, tmp_path / "a", quiet=True)["steps"]
    assert steps == train(made, tmp_path / "a", quiet=True)["metrics"]["steps"] == 1 + 2


def test_a_front_that_cannot_be_reached_is_refused_before_any_work(tiny_base: Path, tmp_path: Path) -> None:
    """Of no evaluation, of no log, of other held-out rows, of another β; the same rows and β are taken."""
    place = tmp_path / "front"
    made = recipe(tiny_base, "alright", stop_front=str(place), beta=0.2)
    unheld = {**ROWS, "sft_eval": [], "pref_eval": []}
    other = {**ROWS, "pref_eval": pref_rows(7, seed=8)}
    cases: list[tuple[type[PaftError], str, dict[str, Any], dict[str, Any]]] = [
        (NotFoundError, "no log.jsonl", ROWS, {}), (UsageError, "stop_front needs evaluation", unheld, {}),
        (UsageError, "eval_strategy is no", ROWS, {"trainer": {"eval_strategy": "no"}}),
        (MismatchError, "other held-out rows", other, {}), (MismatchError, "β = 0.2", ROWS, {"beta": 0.1})]
    for error, said, rows, fields in cases:
        with pytest.raises(error, match=said):
            train(made.model_copy(update=fields), tmp_path / "a", rows=rows, quiet=True)
        assert not list(tmp_path.glob("a*"))
        if error is NotFoundError:
            train(made.model_copy(update={"stop_front": None}), place, rows=ROWS, quiet=True)
    train(made, tmp_path / "b", rows=ROWS, quiet=True)


@pytest.mark.parametrize("method", ["alright", "mix", "sequential"])
def test_the_last_step_of_a_budget_of_tokens_is_known_as_such(
    method: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proximal solver settles in it, the last evaluation belongs to it, and the end of the learning rate is zero before."""
    settled: list[int] = []
    swings: list[float] = []
    settle, report = term.settle, term.L1Term.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        swings.append(term.slack(kwargs["lr_scheduler"], state.max_steps) - kwargs["lr_scheduler"].get_last_lr()[0] / 2)
        report(self, args, state, control, **kwargs)

    monkeypatch.setattr(term, "settle", lambda *args, **kwargs: settled.append(1) or settle(*args, **kwargs))
    monkeypatch.setattr(term.L1Term, "on_step_end", on_step_end)
    made = recipe(tiny_base, method, max_tokens=400, l1=1e-3, l1_solver="proximal",
                  trainer={"max_steps": -1, "lr_scheduler_type": "linear", "eval_steps": 100})
    steps = train(made, tmp_path / "a", rows=ROWS, quiet=True)["metrics"]["steps"]
    assert settled == [1]
    assert swings[:-1] == pytest.approx([0.0] * (int(steps) - 1), abs=1e-12)
    assert evaluations(tmp_path / "a")[-1]["step"] == steps > 2
    assert records(tmp_path / "a")[-1]["step"] == steps and "train_loss" in records(tmp_path / "a")[-1]


@pytest.mark.parametrize(("fields", "said"), [
    ({"trainer": {"max_steps": 7}}, "one budget"),
    ({"trainer": {"max_steps": -1}, "l1": 1e-4, "l1_warmup": 0.1}, "share of the steps")])
def test_a_budget_of_tokens_is_the_only_one(fields: dict[str, Any], said: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train(recipe(tiny_base, "alright", max_tokens=400, **fields), tmp_path / "a", rows=ROWS, quiet=True)


@pytest.mark.parametrize("method", ["alright", "sequential"])
def test_each_epoch_is_evaluated_logged_and_kept(
    method: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch is as many steps as one of both sets takes; what dies in the third goes on from the second, to the bit."""
    epochs = dict.fromkeys(("eval_strategy", "logging_strategy", "save_strategy"), "epoch")
    made = recipe(tiny_base, method, trainer={**epochs, "max_steps": -1, "num_train_epochs": 3, "eval_on_start": False})
    train(made, tmp_path / "whole", rows=ROWS, quiet=True)
    told = evaluations(tmp_path / "whole")
    assert [each["epoch"] for each in told] == [1.0, 2.0, 3.0]
    each = told[0]["step"]
    assert [one["step"] for one in told] == [each, 2 * each, 3 * each] and each == 4 + 3
    with monkeypatch.context() as patch:
        die_at(2 * each + 2, killed, patch.setattr)
        with pytest.raises(Killed):
            train(made, tmp_path / "a", rows=ROWS, quiet=True)
    assert work.newest(tmp_path / "a.partial") == tmp_path / "a.partial" / f"checkpoint-{2 * each}"
    train(made, tmp_path / "a", rows=ROWS, resume=True, quiet=True)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert records(tmp_path / "a") == records(tmp_path / "whole")


def test_optima_that_another_process_estimates_are_waited_for(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the workers of a run come to do; a lock of another file handle is one of another process."""
    made = recipe(tiny_base, "alright", estimate_optima=True, trainer={"max_steps": 2, "eval_strategy": "no"})
    first = train(made, tmp_path / "a", rows=ROWS, quiet=True)
    (place,) = tmp_path.glob("optima-*")
    shutil.rmtree(place)
    waits = threading.Event()
    monkeypatch.setattr(work, "say", lambda line, **kwargs: waits.set() if line.startswith("waiting") else None)
    with ThreadPoolExecutor(1) as pool:
        with work.turn_at(place):
            second = pool.submit(train, made, tmp_path / "b", rows=ROWS, quiet=True)
            assert waits.wait(60) and not list(place.iterdir())
        assert second.result()["optima"] == first["optima"]


def test_sft_rows_that_are_dropped_are_counted(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = [{"prompt": "the cat " * 20, "completion": " dog"}] * 3
    made = recipe(tiny_base, "mix", trainer={"max_length": 30, "max_steps": 1})
    train(made, tmp_path / "a", rows={**ROWS, "sft": [*ROWS["sft"], *long]})
    assert "3 of 16 SFT rows dropped: the prompt alone fills max_length=30" in capsys.readouterr().err
