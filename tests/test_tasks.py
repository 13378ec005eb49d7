"""Named tasks through the real harness, on a local task file: scores by hand, in memory, refused in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory
from datakit import write_jsonl

from paft.candidates import score
from paft.cli import invoke
from paft.errors import NotFoundError, ResourceError, UsageError
from paft.evaluate import answer_logps
from paft.merge.engine import merge
from paft.models import load_model, load_tokenizer, wrap
from paft.recipe import MergeRecipe
from paft.tasks import PRESETS, Harness, expand

CHOICES = ["red", "blue green", "cold"]
NOUNS = "cat dog bird fish hello system".split()
ROWS = [{"q": f"the {noun} is", "choices": CHOICES, "gold": i % 3} for i, noun in enumerate(NOUNS)]
TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE, train: FILE}}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
NOTHING: dict[str, Any] = {"sft_data": None, "pref_data": None, "text": None, "beta": 0.1, "generate": 0, "rows": None,
                           "batch_size": 4, "quiet": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    file = write_jsonl(folder / "mine.jsonl", ROWS)
    few = write_jsonl(folder / "few.jsonl", ROWS[:3])
    for name, data in (("mine", file), ("few", few), ("gone", folder / "gone.jsonl")):
        (folder / f"{name}.yaml").write_text(TASK.replace("NAME", name).replace("FILE", str(data)))
    wrong = TASK.replace("NAME", "wrong").replace("FILE", str(file)).replace("multiple_choice", "choice")
    (folder / "wrong.yaml").write_text(wrong)
    (folder / "both.yaml").write_text("group: both\ntask: [mine, few]\naggregate_metric_list:\n"
                                      "  - {metric: acc, aggregation: mean, weight_by_size: true}\n")
    return folder


@pytest.fixture(scope="module")
def mine(folder: Path) -> Harness:
    return Harness(["mine"], path=folder, batch_size=4)


def by_hand(model: Any, tokenizer: Any, shots: int = 0) -> float:
    """The share of rows whose right choice is the likeliest, after ``shots`` of the first rows with their answers."""
    right = []
    for row in ROWS:
        shown = [one for one in ROWS if one != row][:shots] if shots else []
        prompt = "".join(f"{one['q']} {CHOICES[one['gold']]}\n\n" for one in shown) + row["q"]
        start = len(tokenizer(prompt)["input_ids"])
        coded = [(tokenizer(f"{prompt} {choice}")["input_ids"], start) for choice in CHOICES]
        right.append(int(torch.argmax(answer_logps(model, coded, 0, 8)[0])) == row["gold"])
    return sum(right) / len(right)


def test_accuracy_is_that_by_hand(mine: Harness, tiny_base: Path, make_adapter: AdapterFactory) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    seen = set()
    for seed in range(4):
        model = wrap(load_model(str(tiny_base)), make_adapter(tiny_base, seed))
        row = mine("it", model, tokenizer)
        p = by_hand(model, tokenizer)
        assert row["mine"] == pytest.approx(p)
        assert row["mine_stderr"] == pytest.approx((p * (1 - p) / 5) ** 0.5)
        assert row["tasks"]["mine"]["metric"] == "acc" and row["tasks"]["mine"]["rows"] == 6
        seen.add(p)
    assert len(seen) > 1


def test_shots_and_limit(folder: Path, tiny_base: Path) -> None:
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    harness = Harness(["mine"], path=folder, shots=2)
    found = harness("it", model, tokenizer)
    assert found["tasks"]["mine"]["shots"] == 2 and found["mine"] == pytest.approx(by_hand(model, tokenizer, 2))
    assert "2 shots" in harness.columns[0].help
    assert Harness(["mine"], path=folder, limit=2)("it", model, tokenizer)["tasks"]["mine"]["rows"] == 2


def test_a_group_is_one_column(folder: Path, tiny_base: Path) -> None:
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    row = Harness(["both", "mine", "few"], path=folder)("it", model, tokenizer)
    assert list(row["tasks"]) == ["both", "mine", "few"] and row["tasks"]["both"]["rows"] == 9
    assert row["both"] == pytest.approx((6 * row["mine"] + 3 * row["few"]) / 9)
    assert row["mine"] != row["few"]


def test_candidates_in_memory_score_as_alone(folder: Path, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    """Base, adapters and a merge over one base in memory, in any order, against each loaded from disk by itself."""
    adapters = [str(make_adapter(tiny_base, seed)) for seed in (1, 2)]
    recipe = MergeRecipe(method="ties", parameters={"density": 0.5}, adapters=adapters)
    merge(adapters, base=None, method="ties", parameters={"density": 0.5}, weights=None, out=tmp_path / "written")
    harness = Harness(["mine"], path=folder)
    files = {"sft_data": str(write_jsonl(tmp_path / "s.jsonl", [{"prompt": "the cat", "completion": " red blue"}]))}
    together = score([*adapters, adapters[0]], base=None, **{**NOTHING, **files}, merges={"m": recipe}, measures=[harness])
    alone = [score([one], base=str(tiny_base), **{**NOTHING, **files}, measures=[harness])[-1]
             for one in (*adapters, adapters[0], str(tmp_path / "written"))]
    assert [row["name"] for row in together] == [str(tiny_base), *adapters, adapters[0], "m"]
    assert [{**row, "name": ""} for row in together[1:]] == [{**row, "name": ""} for row in alone]
    assert len({row["sft_loss"] for row in together}) == 4


def test_tasks_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind, said in (("gone", NotFoundError, "data of task gone cannot be read"), ("wrong", UsageError, "task wrong")):
        with pytest.raises(kind, match=said):
            Harness([name], path=folder)
    with pytest.raises(NotFoundError, match="no directory"):
        Harness(["mine"], path=folder / "nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ResourceError, match="lm-evaluation-harness"):
        Harness(["mine"], path=folder)


@pytest.mark.slow
def test_presets_are_tasks_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager()  # which reads some thousand files
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)
    assert {task.name for preset in PRESETS.values() for task in preset} <= set(manager.all_tasks)
    assert [(task.name, task.shots) for task in expand(["leaderboard-v1"])] == [
        ("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("truthfulqa_mc2", 0), ("winogrande", 5), ("gsm8k", 5)]
    assert [task.shots for task in expand(["leaderboard-v2", "mine"], shots=1)] == [1] * 7
    with pytest.raises(UsageError, match="no task 'hellaswagg'") as caught:
        Harness(["hellaswagg"])
    assert caught.value.hint == "did you mean 'hellaswag'?"


def test_from_the_command_line(folder: Path, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path,
                               capsys: Capture) -> None:
    world = World(tiny_base, make_adapter, tmp_path)
    recipe = tmp_path / "sum.yaml"
    recipe.write_text(f"kind: merge\nmethod: linear\nadapters: ['{world.one}', '{world.two}']\n")
    command = ["eval", str(world.one), "--merge", str(recipe), "--task-path", str(folder), "--tasks"]
    assert invoke([*command, "mine", "--limit", "3", "--json", "--apply-chat-template"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [str(tiny_base), str(world.one), "sum"] and all("mine_stderr" in row for row in rows)
    assert invoke([*command, "mine"]) == 0
    out, err = capsys.readouterr()
    assert "mine" in out.splitlines()[0] and "it/s" not in err
    assert_one_error(capsys, invoke([*command, "gone"]), 4, "the data of task gone cannot be read")
    assert_one_error(capsys, invoke(["eval", "--tasks", "mine"]), 2, "nothing to evaluate")
