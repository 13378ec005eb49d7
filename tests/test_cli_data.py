"""The data options of the training commands: --show-sample, mixtures, columns, templates, streams; and their refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from clikit import Capture, assert_one_error
from datakit import Row, assistant, chat_rows, pair_rows, user, write_jsonl
from peft import PeftModel
from transformers import AutoTokenizer

from paft.cli import invoke
from paft.cli.sample import WIDTH, sample_lines
from paft.models import load_model


class Place:
    """A base (and the same without a chat template), data files, a target."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.out = base, folder / "out"
        self.plain = Path(shutil.copytree(base, folder / "plain"))
        (self.plain / "chat_template.jinja").unlink()
        self.chat = write_jsonl(folder / "chat.jsonl", chat_rows(24))
        self.pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
        self.folder = folder

    def file(self, rows: list[Row], name: str = "rows.jsonl") -> str:
        return str(write_jsonl(self.folder / name, rows))

    def sft(self, *more: str, base: Path | None = None) -> list[str]:
        return ["train-sft", "-m", str(base or self.base), "-o", str(self.out), "--set", "trainer.max_steps=2",
                "--set", "trainer.per_device_train_batch_size=4", *more]


@pytest.fixture
def place(tiny_base: Path, tmp_path: Path) -> Place:
    return Place(tiny_base, tmp_path)


# --show-sample


def test_show_sample_marks_what_is_trained_on_and_trains_nothing(place: Place, capsys: Capture) -> None:
    turns = [user("is the cat red"), assistant("no please"), user("what"), assistant("blue cat")]
    assert invoke(place.sft("-d", place.file([{"messages": turns}]), "--show-sample")) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "train row 1, answer: 9 tokens, the loss counts 3: >"
    assert lines == ["  <user> is the cat red <assistant>", ">  no please <eos>"]
    assert not place.out.exists()


def test_show_sample_of_pairs_and_of_both_objectives(place: Place, capsys: Capture) -> None:
    pairs, chat = str(place.pairs), str(place.chat)
    assert invoke(["train-dpo", "-m", str(place.base), "-d", pairs, "--show-sample", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(sample["set"], sample["part"]) for sample in found["samples"]] == [("train", "chosen"), ("train", "rejected")]
    tokenizer = AutoTokenizer.from_pretrained(place.base)
    for sample in found["samples"]:
        learnt = [label for label in sample["labels"] if label != -100]
        assert tokenizer.decode(learnt).split()[-1] == "<eos>" and len(learnt) == sample["trained"]
        assert "".join(part["text"] for part in sample["segments"]) == tokenizer.decode(sample["input_ids"])
    assert invoke(["train-joint", "-m", str(place.base), "--sft-data", chat, "--pref-data", pairs, "--show-sample"]) == 0
    heads = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " row 1, " in line]
    assert heads == ["sft row 1, answer", "pref row 1, chosen", "pref row 1, rejected"]


def test_a_sample_keeps_to_80_columns_and_shows_what_cannot_be_seen() -> None:
    text = "word " * 60 + "\n\n\ttab\x1b[31mred\n" + "x" * 200
    sample = {"set": "train", "part": "answer", "tokens": 9, "trained": 4, "length": 12,
              "segments": [{"trained": False, "tokens": 5, "text": text}, {"trained": True, "tokens": 4, "text": "end\n"}]}
    lines = [click.unstyle(line) for line in sample_lines({"samples": [sample]})]
    assert "(cut from 12)" in lines[0] and all(len(line) <= WIDTH for line in lines)
    assert not any("\x1b" in line or "\t" in line for line in lines)
    body = "".join(line[2:] for line in lines[1:] if line.startswith("  "))
    assert body == text.replace("\n", "↵").replace("\t", "\\t").replace("\x1b", "\\x1b")
    assert lines[-1] == "> end↵"


# Mixtures, columns, templates


def test_a_mixture_with_columns(place: Place, capsys: Capture) -> None:
    one = place.file([{"q": f"is {word}", "a": "yes"} for word in ("cat", "dog", "fish", "bird")], "one.jsonl")
    two = place.file([{"q": f"what {word}", "a": "no"} for word in ("cat", "dog", "fish", "bird")], "two.jsonl")
    said = ["-d", one, "-d", two, "--mix", "1,3", "--columns", "user=q,assistant=a"]
    assert invoke(place.sft(*said, "--dry-run", "--json")) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["rows"]["train"] == 5 and "mixed 1 of 4 rows of" in err
    assert plan["recipe"]["data"] == [{"source": name, "weight": weight, "rows": None, "columns": {}}
                                      for name, weight in ((one, 1.0), (two, 3.0))]
    recipe = place.folder / "mine.yaml"
    recipe.write_text(f"kind: train-sft\ndata:\n- {{source: {one}, weight: 1}}\n- {{source: {two}, weight: 3, rows: 3}}\n"
                      "columns: {user: q, assistant: a}\n")
    assert invoke(place.sft("-c", str(recipe), "--dry-run", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["train"] == 4


def test_a_chosen_template_is_trained_with_saved_and_used_again(place: Place, capsys: Capture) -> None:
    said = ["-d", str(place.chat), "--chat-template", "zephyr"]
    assert invoke(place.sft(*said, "--show-sample", base=place.plain)) == 0
    assert len(capsys.readouterr().out.splitlines()) > 2
    assert invoke(place.sft(*said, "-q", base=place.plain)) == 0
    capsys.readouterr()
    saved = AutoTokenizer.from_pretrained(place.out)
    assert saved.apply_chat_template([user("is it")], tokenize=False, add_generation_prompt=True) == (
        "<|user|>\nis it<eos>\n<|assistant|>\n")
    PeftModel.from_pretrained(load_model(str(place.plain)), place.out)
    score = ["eval", str(place.out), "--sft-data", str(place.chat), "--json", "-q"]
    assert invoke(score) == 0
    rendered = json.loads(capsys.readouterr().out)
    (place.out / "chat_template.jinja").unlink()
    assert invoke(score) == 3  # the base has none: it must have been the adapter's
    assert "has no chat template" in capsys.readouterr().err and rendered


@pytest.mark.parametrize("command", ["train-sft", "train-dpo"])
def test_a_stream_trains(command: str, place: Place, capsys: Capture) -> None:
    data = place.pairs if command == "train-dpo" else place.chat
    held = place.file((pair_rows(30) if command == "train-dpo" else chat_rows(30))[24:], "held.jsonl")
    args = [command, *place.sft("-d", str(data), "--streaming", "--eval-data", held, "--json")[1:]]
    assert invoke(args) == 0
    out, err = capsys.readouterr()
    manifest = json.loads(out)
    assert manifest["metrics"]["steps"] == 2 and "eval_loss" in manifest["metrics"]
    assert manifest["inputs"]["train"].startswith("first 24 rows: ") and "streamed" in err
    assert invoke([*args, "--dry-run", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_a_run_takes_mixtures_a_template_and_bad_rows(place: Place, capsys: Capture) -> None:
    """Each stage trains and the evaluation scores with the run's template: the base has none."""
    more = place.file([*chat_rows(120)[60:], {"messages": [user("a"), assistant(" ")]}], "more.jsonl")
    pairs = place.file(pair_rows(80), "many.jsonl")
    recipe = place.folder / "run.yaml"
    stage = "lora: {r: 2, targets: [q_proj]}, trainer: {max_steps: 1}"
    recipe.write_text(f"""
kind: run
name: small
model: {place.plain}
chat_template: alpaca
on_bad_row: drop
data:
  sft: {{train: [{{source: {place.chat}, weight: 1}}, {{source: {more}, weight: 2}}]}}
  pref: [{pairs}]
defaults: {{sft: {{{stage}}}, dpo: {{{stage}}}}}
train: {{sft: {{objective: sft}}, dpo: {{objective: dpo}}}}
evaluate: {{rows: 2}}
""")
    assert invoke(["run", str(recipe), "-o", str(place.out), "--workers", "1"]) == 0
    err = capsys.readouterr().err
    assert "1 of 61 rows dropped" in err and "mixed 24 of 24 rows" in err
    assert (place.out / "adapters" / "dpo" / "chat_template.jinja").is_file()
    recipe.write_text(recipe.read_text().replace("chat_template: alpaca\n", ""))
    assert invoke(["run", str(recipe), "-o", str(place.folder / "other"), "-q"]) == 3
    assert "has no chat template" in capsys.readouterr().err


# Refusals


def bad_row(place: Place) -> list[str]:
    return place.sft("-d", place.file([*chat_rows(3), {"messages": [user("a"), assistant(" ")]}]))


def bad_template(place: Place) -> list[str]:
    return place.sft("-d", str(place.chat), "--chat-template", "nope")


def no_template(place: Place) -> list[str]:
    return place.sft("-d", str(place.chat), base=place.plain)


def bad_mapping(place: Place) -> list[str]:
    return place.sft("-d", place.file([{"q": "a", "b": "c"}]), "--columns", "prompt=x,completion=b")


def endless_stream(place: Place) -> list[str]:
    return ["train-sft", "-m", str(place.base), "-o", str(place.out), "-d", str(place.chat), "--streaming"]


def broken_stream(place: Place) -> list[str]:
    rows = [{"prompt": f"is {i}", "completion": " yes"} for i in range(1001)]
    file = place.file([*rows, {"prompt": "a", "completion": ""}])
    return place.sft("-d", file, "--streaming", "--set", "trainer.per_device_train_batch_size=600")


def leaking_stream(place: Place) -> list[str]:
    return place.sft("-d", str(place.chat), "--streaming", "--eval-data", place.file(chat_rows(3)))


def long_prompts(place: Place) -> list[str]:
    return place.sft("-d", str(place.chat), "--set", "trainer.max_length=3")


def mixed_forms(place: Place) -> list[str]:
    return place.sft("-d", str(place.chat), "-d", place.file([{"prompt": "a", "completion": "b"}]))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # nor is a thread's traceback printed
@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (bad_row, 2, "row 4: `messages` ends in an empty answer"),
        (bad_template, 4, "no chat template 'nope'"),
        (no_template, 3, "has no chat template"),
        (bad_mapping, 2, "no column 'x', only ['b', 'q']"),
        (endless_stream, 2, "needs trainer.max_steps"),
        (broken_stream, 2, "row 1002: `completion` is empty"),
        (leaking_stream, 3, "row 1 is in the evaluation data"),
        (long_prompts, 3, "no row is left to train on"),
        (mixed_forms, 2, "holds messages"),
        (lambda p: p.sft("-d", str(p.chat), "--mix", "1,2"), 2, "--mix has 2 weights for 1 --data"),
        (lambda p: p.sft("-d", str(p.chat), "--mix", "half"), 2, "no list of numbers"),
        (lambda p: p.sft("-d", str(p.chat), "--mix", "-1"), 2, "weight: input should be greater than 0"),
        (lambda p: p.sft("-d", str(p.chat), "--columns", "prompt"), 2, "is not ours=theirs"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(spoil: Callable[[Place], list[str]], code: int, said: str, place: Place,
                                                  capsys: Capture) -> None:
    assert_one_error(capsys, invoke([*spoil(place), "-q"]), code, said)
    assert not place.out.exists()


def test_bad_rows_can_be_dropped(place: Place, capsys: Capture) -> None:
    assert invoke([*bad_row(place), "--drop-bad-rows", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "1 of 4 rows dropped; the first is row 4" in err and "3 train rows" in out
