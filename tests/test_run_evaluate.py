"""The evaluation of a run: one resident base, named tasks in the table, a cache by content, refusals before any training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, assert_one_error
from datakit import chat_rows, pair_rows, write_jsonl
from test_tasks import ROWS, TASK

from paft import runeval
from paft.cli import invoke
from paft.evaluate import Evaluator, Held
from paft.models import load_model, load_tokenizer, wrap
from paft.recipe import RunRecipe, load
from paft.run import plan
from paft.runjob import Run
from paft.runmerge import merge_all
from paft.tasks import Harness

RECIPE = """
kind: run
name: asked
model: {base}
data: {{sft: {folder}/chat.jsonl, pref: {folder}/pairs.jsonl, text: {folder}/text.jsonl}}
defaults:
  sft: &shared
    lora: {{r: 2, alpha: 4, targets: [q_proj, down_proj]}}
    trainer: {{max_steps: 2, per_device_train_batch_size: 4, learning_rate: 3e-2}}
  dpo: *shared
train:
  sft: {{objective: sft}}
  dpo: {{objective: dpo}}
merge:
  ties: {{of: [sft, dpo], method: ties, parameters: {{density: 0.5}}}}
evaluate:
  rows: 6
  tasks: {{names: [mine, few], path: {folder}, only: [base, sft, ties]}}
"""


class Asked:
    """A run with tasks of its own files, and its command line."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.out, self.recipe = folder, base, folder / "out", folder / "asked.yaml"
        write_jsonl(folder / "chat.jsonl", chat_rows(60))
        write_jsonl(folder / "pairs.jsonl", pair_rows(60))
        write_jsonl(folder / "text.jsonl", [{"text": "the cat is big"}])
        self.task("mine", ROWS)
        self.task("few", ROWS[:3])
        (folder / "gone.yaml").write_text(TASK.replace("NAME", "gone").replace("FILE", str(folder / "nowhere.jsonl")))
        self.recipe.write_text(RECIPE.format(base=base, folder=folder))

    def task(self, name: str, rows: list[dict[str, Any]], text: str = TASK) -> None:
        file = write_jsonl(self.folder / f"{name}.jsonl", rows)
        (self.folder / f"{name}.yaml").write_text(text.replace("NAME", name).replace("FILE", str(file)))

    def __call__(self, *more: str) -> int:
        return invoke(["run", str(self.recipe), "-o", str(self.out), "--workers", "1", *more])

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in json.loads((self.out / "report.json").read_text())["rows"]}

    def stamps(self) -> list[int]:
        return [path.stat().st_mtime_ns for kind in ("adapters", "merges") for path in (self.out / kind).glob("*/paft.json")]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Asked:
    made = Asked(tmp_path_factory.mktemp("asked"), tiny_base)
    assert made() == 0
    return made


def refuse(what: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{what} is measured again")

    return call


def job_of(asked: Asked) -> Run:
    job = Run(load(RunRecipe, asked.recipe), asked.out, quiet=True)
    job.read()
    return job


def test_scores_are_those_of_each_model_loaded_alone(asked: Asked) -> None:
    job = job_of(asked)
    held = Held(job.sft["test"], job.pref["test"], job.text).head(6)
    tokenizer = load_tokenizer(str(asked.base), chat=isinstance(held.sft[0]["prompt"], list))
    scorer = Evaluator(tokenizer, held, None, 0.1, 64).against(load_model(str(asked.base)))
    harness, found = Harness(["mine", "few"], path=asked.folder, batch_size=64), asked.rows()
    for name, path in job.candidates().items():
        alone = wrap(load_model(str(asked.base)), path) if name in job.recipe.train else load_model(str(path))
        expected = scorer(alone)
        if name in ("base", "sft", "ties"):
            expected |= harness(name, alone, tokenizer)
        assert {key: found[name].get(key) for key in expected} == expected
        assert ("mine" in found[name]) is (name in ("base", "sft", "ties"))
    assert len({row["sft_loss"] for row in found.values()}) == len(found) == 4


def test_the_base_is_loaded_once(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(runeval, "load_model", lambda name, **more: loaded.append(name) or load_model(name, **more))
    (asked.out / "scores.json").unlink()
    before = asked.rows()
    assert asked("--resume", "-q") == 0
    assert loaded == [str(asked.base), str(asked.out / "merges" / "ties")] and asked.rows() == before


@pytest.mark.parametrize("left", range(4))
def test_an_evaluation_that_was_cut_short_ends_in_the_same_scores(asked: Asked, left: int) -> None:
    """Wherever it goes on, the reference of the DPO loss is the base, and not what is on it."""
    before, file = asked.rows(), asked.out / "scores.json"
    scores = json.loads(file.read_text())
    held = [key for key, score in scores.items() if "dpo_loss" in score]
    file.write_text(json.dumps({key: score for key, score in scores.items() if key in held[:left]}))
    assert asked("--resume", "-q") == 0 and asked.rows() == before
    file.write_text(file.read_text()[:40 * left])  # as one that was killed while it wrote would have left it
    (asked.out / ".scores.json.new").write_text("{")
    assert asked("--resume", "-q") == 0 and asked.rows() == before and not list(asked.out.glob(".*"))


def test_tasks_are_columns_of_the_report(asked: Asked, capsys: Capture) -> None:
    head = (asked.out / "report.md").read_text().split("| --- |")[0]
    assert "| mine |" in head and "| few |" in head
    assert asked("--resume") == 0
    out = capsys.readouterr().out
    assert "mine" in out and "lm-eval: acc, 0 shots, 6 rows" in out and "lm-eval: acc, 0 shots, 3 rows" in out


def test_what_a_changed_task_file_touches(asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Its own scores, not those of another task, nor those on held-out rows."""
    stamps, before, called = asked.stamps(), asked.rows(), []
    measure = Harness.__call__
    monkeypatch.setattr(Evaluator, "__call__", refuse("what is held out"))
    monkeypatch.setattr(Harness, "__call__", refuse("a task"))
    assert asked("--resume", "-q", "--set", f"evaluate.tasks.path={asked.folder}/") == 0
    monkeypatch.setattr(Harness, "__call__", lambda self, *given: called.append((given[0], given[3])) or measure(self, *given))
    try:
        asked.task("mine", ROWS[1:])
        assert asked("--resume", "-q") == 0
        assert called == [(name, "mine") for name in ("base", "sft", "ties")]
        assert asked.rows() != before and asked.stamps() == stamps
    finally:
        asked.task("mine", ROWS)
    assert asked("--resume", "-q") == 0
    assert asked.rows() == before


@pytest.mark.parametrize(("setting", "code", "said"), [
    ("evaluate.tasks.names=[mien]", 2, "there is no task 'mien'"), ("evaluate.tasks.names=[gone]", 4, "the data of task gone"),
    ("evaluate.tasks.path=nowhere", 4, "no directory nowhere"), ("evaluate.tasks.only=[stf]", 2, "there is no row 'stf'"),
    ("evaluate.tasks.names=[]", 2, "evaluate.tasks.names"), ("evaluate.tasks.limt=3", 2, "limt"),
])
def test_what_cannot_be_asked_is_refused_before_any_training(asked: Asked, capsys: Capture, setting: str, code: int,
                                                             said: str) -> None:
    new = asked.folder / "new"
    more, compare = ["-o", str(new), "--set", setting], ["compare", str(asked.recipe), "-q"]
    assert_one_error(capsys, asked("--dry-run", *more), code, said)
    if "mien" not in setting:  # to look through all tasks of the harness takes seconds
        assert_one_error(capsys, asked("-q", *more), code, said)
        assert_one_error(capsys, invoke([*compare, "--dry-run", *more]), code, said)
        assert_one_error(capsys, invoke([*compare, *more]), code, said)
    assert not new.exists()


def test_without_the_harness_it_is_refused_too(asked: Asked, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert_one_error(capsys, asked("-q", "-o", str(asked.folder / "new")), 5, "lm-evaluation-harness")
    assert not (asked.folder / "new").exists()


def test_a_task_that_fails_keeps_what_is_finished(asked: Asked, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps, text = asked.stamps(), TASK.replace("{{q}}", "{{q.lower()}}")
    capsys.readouterr()
    try:
        asked.task("few", [ROWS[0], {**ROWS[1], "q": None}], text)
        assert_one_error(capsys, asked("--resume", "-q"), 3, "task few on base")
        assert asked.stamps() == stamps
        monkeypatch.setattr(Evaluator, "__call__", refuse("what is held out"))
        asked.task("few", ROWS[:2], text)
        assert asked("--resume", "-q") == 0
        assert asked.stamps() == stamps and asked.rows()["base"]["tasks"]["few"]["rows"] == 2
    finally:
        asked.task("few", ROWS[:3])


def test_the_forecast_counts_the_tokens_that_are_read(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    from paft import evaluate
    from paft.models import parameters
    from paft.train import forecast

    read, measure = [], evaluate.answer_logps
    monkeypatch.setattr(evaluate, "answer_logps", lambda model, coded, *more: read.append(sum(len(ids) for ids, _ in coded))
                        or measure(model, coded, *more))
    monkeypatch.setattr(forecast, "_rate", lambda: 1 / forecast.REACHED)
    job = job_of(asked)
    recipe = job.recipe.model_copy(update={"evaluate": job.recipe.evaluate.model_copy(update={"tasks": None})})
    other = Run(recipe, asked.folder / "elsewhere", quiet=True)
    (other.out / "adapters").mkdir(parents=True)
    for name in recipe.train:
        other.adapter(name).symlink_to(asked.out / "adapters" / name)
    foretold = plan(recipe, other.out, workers=1)
    other.read()
    merge_all(other)
    assert foretold["evaluate_seconds"] == pytest.approx(2 * sum(runeval.evaluate_all(other, None) and read) *
                                                         parameters(asked.base), rel=1e-6)
    again = plan(recipe, other.out, workers=1)
    assert (again["seconds"], again["merge_seconds"], again["evaluate_seconds"]) == (0, 0, 0) < (foretold["merge_seconds"],)
