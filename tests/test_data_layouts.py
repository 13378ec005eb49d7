"""Every layout of a row becomes TRL's own, the same conversation the same tokens, and nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datakit import Row, assistant, user
from trainkit import parts
from trl import SFTConfig, SFTTrainer

from paft.data import dataset
from paft.data.formats import LAYOUTS, layout, rename
from paft.data.load import convert
from paft.errors import PaftError, UsageError

SYSTEM = {"role": "system", "content": "please"}
YES = {"prompt": [user("is it")], "completion": [assistant("yes")]}


def said(who: str, text: str) -> Row:
    return {"from": who, "value": text}


def shaped(row: Row, role: Any, columns: dict[str, str] | None = None) -> list[Row]:
    [(number, found)] = convert([row], role, columns or {})
    assert number == 1
    if isinstance(found, PaftError):
        raise found
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"user": "is it", "assistant": "yes"},
        {"instruction": "is it", "input": "", "output": "yes", "text": "Below is an instruction ..."},
        {"instruction": "is it", "input": None, "output": "yes"},
        {"instruction": "", "input": "is it", "output": "yes"},
        {"conversations": [said("human", "is it"), said("gpt", "yes")]},
        {"messages": [said("user", "is it"), said("assistant", "yes")]},
        {"messages": [user("is it"), {**assistant("yes"), "tool_calls": None, "name": None}], "tools": []},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "is "}, {"type": "text", "text": "it"}]},
                      assistant("yes")]},
        {"prompt": "is it", "completion": "yes", "system": ""},
        {"prompt": [user("is it")], "completion": assistant("yes")},
        {"messages": [user("is it"), assistant("yes")], "system": None},
    ],
)
def test_one_question_in_many_layouts(row: Row) -> None:
    assert shaped(row, "sft") == [YES]


@pytest.mark.parametrize(
    "row",
    [
        {"user": "is it", "assistant": "yes", "system": "please"},
        {"instruction": "is it", "output": "yes", "system": "please"},
        {"prompt": "is it", "completion": "yes", "system": "please"},
        {"conversations": [said("system", "please"), said("human", "is it"), said("gpt", "yes")]},
        {"conversations": [said("human", "is it"), said("gpt", "yes")], "system": "please"},
    ],
)
def test_a_system_text_comes_first(row: Row) -> None:
    assert shaped(row, "sft") == [{"prompt": [SYSTEM, user("is it")], "completion": [assistant("yes")]}]


def test_an_alpaca_input_follows_the_instruction() -> None:
    [row] = shaped({"instruction": "name it", "input": "cat", "output": "yes"}, "sft")
    assert row["prompt"] == [user("name it\n\ncat")]


def test_weight_zero_is_context_only() -> None:
    turns = [user("a"), {**assistant("no"), "weight": 0}, user("c"), {**assistant("yes"), "weight": 1}]
    learnt = {"prompt": [user("a"), assistant("no"), user("c")], "completion": [assistant("yes")]}
    assert shaped({"messages": turns}, "sft") == [learnt]
    with_system = shaped({"messages": turns, "system": "please"}, "sft")
    assert with_system == [{**learnt, "prompt": [SYSTEM, *learnt["prompt"]]}]


PAIR = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}


@pytest.mark.parametrize(
    "row",
    [
        {"user": "a", "chosen": "b", "rejected": "c"},
        {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
        {"conversations": [said("human", "a")], "chosen": said("gpt", "b"), "rejected": said("gpt", "c")},
        {"prompt": "a", "chosen": [said("human", "a"), said("gpt", "b")], "rejected": [said("human", "a"), said("gpt", "c")]},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    ],
)
def test_one_pair_in_many_layouts(row: Row) -> None:
    assert shaped(row, "pref") == [PAIR]


def test_hh_dialogues_keep_their_turns() -> None:
    begin = "\n\nHuman: a\n\nAssistant: b: b\n\nHuman: c\n\nlast"
    [row] = shaped({"chosen": begin + "\n\nAssistant: d", "rejected": begin + "\n\nAssistant: e"}, "pref")
    assert row == {"prompt": [user("a"), assistant("b: b"), user("c\n\nlast")], "chosen": [assistant("d")],
                   "rejected": [assistant("e")]}


@pytest.mark.parametrize(("label", "read"), [(True, True), (0, False), ("true", True), ("False", False), ("1", True)])
def test_unpaired_labels(label: Any, read: bool) -> None:
    [row] = shaped({"prompt": "a", "completion": "b", "label": label}, "unpaired")
    assert row == {"prompt": "a", "completion": "b", "label": read} and isinstance(row["label"], bool)


def test_pairs_serve_as_unpaired_and_scored() -> None:
    good, bad = {"prompt": [user("a")], "completion": [assistant("b")]}, {"prompt": [user("a")], "completion": [assistant("c")]}
    assert shaped(PAIR, "unpaired") == [{**good, "label": True}, {**bad, "label": False}]
    assert shaped(PAIR, "scored") == shaped(PAIR, "pref")  # UFT takes them apart itself, and measures DPO on those held out
    assert shaped({"prompt": "a", "completion": "b", "label": 0.3}, "scored")[0]["label"] == 0.3


@pytest.mark.parametrize(
    ("role", "row", "words"),
    [
        ("sft", {"messages": [user("a"), {**assistant("b"), "tool_calls": [{"id": 1}]}]}, "`tool_calls`"),
        ("sft", {"messages": [user("a"), {**assistant("b"), "reasoning_content": "hm"}]}, "`reasoning_content`"),
        ("sft", {"messages": [user("a"), {"role": "tool", "content": "x"}, assistant("b")]}, "turn of a tool"),
        ("sft", {"messages": [user("a"), {**assistant("b"), "weight": 0.5}]}, "weight 0.5"),
        ("sft", {"messages": [user("a"), {**assistant("b"), "weight": 0}]}, "no assistant turn to learn"),
        ("sft", {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("b")]}, "`content` string"),
        ("sft", {"messages": [user("a"), assistant("b")], "tools": "[{}]"}, "`tools`"),
        ("sft", {"messages": [SYSTEM, user("a"), assistant("b")], "system": "c"}, "system message and a `system` column"),
        ("sft", {"prompt": [user("a")], "completion": [user("b")]}, "ends with a turn of the user"),
        ("sft", {"prompt": [user(" ")], "completion": [assistant("b")]}, "empty message"),
        ("sft", {"prompt": " ", "completion": "b"}, "`prompt` is empty"),
        ("sft", {"conversations": [said("human", "a"), said("observation", "b"), said("gpt", "c")]}, "'observation'"),
        ("sft", {"instruction": "a", "output": "b", "history": [["x", "y"]]}, "`history`"),
        ("sft", {"instruction": "a", "output": None}, "`assistant` is no string"),
        ("sft", {"instruction": "a", "input": 3, "output": "b"}, "`input` is no string"),
        ("pref", {"prompt": [user("a")], "chosen": said("gpt", "b"), "rejected": said("gpt", " ")}, "empty answer"),
        ("unpaired", {"prompt": "a", "completion": "b", "label": 0.5}, "not true or false"),
        ("unpaired", {"prompt": "a", "completion": "b", "label": "maybe"}, "'maybe'"),
        ("scored", {"prompt": "a", "completion": "b", "label": 1.5}, "from 0 to 1"),
        ("scored", {"prompt": "a", "completion": "b", "label": float("nan")}, "from 0 to 1"),
    ],
)
def test_what_would_be_lost_or_is_wrong_is_refused_by_name(role: str, row: Row, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        shaped(row, role)
    assert words in caught.value.message and "\n" not in caught.value.message


def test_a_mapping_renames_and_decides_the_layout() -> None:
    row = {"question": "a", "answer": "b", "text": "c", "messages": [user("x"), assistant("y")]}
    assert shaped(row, "sft", {"prompt": "question", "completion": "answer"}) == [{"prompt": "a", "completion": "b"}]
    assert shaped(row, "sft", {"user": "question", "assistant": "answer"})[0]["completion"] == [assistant("b")]
    assert shaped(row, "sft") == [{"prompt": [user("x")], "completion": [assistant("y")]}]
    assert rename({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1}
    with pytest.raises(UsageError, match="no column 'query', only"):
        shaped(row, "sft", {"prompt": "query"})


def test_missing_columns_come_with_a_mapping_to_try() -> None:
    with pytest.raises(UsageError) as caught:
        layout({"question": "a", "response": "b"}, "sft", {})
    assert "--columns prompt=question,completion=response;" in str(caught.value.hint)
    with pytest.raises(UsageError) as caught:
        layout({"prompt": "a", "better": "b", "other": "c"}, "pref", {})
    assert "--columns chosen=better,rejected=...;" in str(caught.value.hint)
    assert all(LAYOUTS.values())


def test_the_trainer_sees_the_same_tokens_and_mask_for_each_layout(tiny_base: Path, tmp_path: Path) -> None:
    asked, replied = ["is the cat red", "what color"], ["no please", "it is big"]
    turns = [turn for q, a in zip(asked, replied, strict=True) for turn in (user(q), assistant(a))]
    layouts: list[list[Row]] = [
        [{"messages": turns}],
        [{"conversations": [said({"user": "human", "assistant": "gpt"}[t["role"]], t["content"]) for t in turns]}],
        [{"prompt": turns[:1], "completion": turns[1:2]}, {"prompt": turns[:3], "completion": turns[3:]}],
    ]
    single: list[list[Row]] = [[{"instruction": asked[0], "input": "", "output": replied[0]}], [{"messages": turns[:2]}],
                               [{"user": asked[0], "assistant": replied[0]}]]
    model, tokenizer = parts(tiny_base)
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, shuffle_dataset=False)

    def seen(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
        ready = dataset([row for raw in rows for row in shaped(raw, "sft")])
        prepared: Any = SFTTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=ready).train_dataset
        return [(row["input_ids"], row["labels"]) for row in prepared]

    for group in (layouts, single):
        first, *others = [seen(rows) for rows in group]
        assert all(json.dumps(other) == json.dumps(first) for other in others)
    ids, labels = seen(layouts[0])[1]
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(learnt).split() == [*replied[1].split(), "<eos>"]
