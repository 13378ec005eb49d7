"""Data: every format becomes one shape or is refused by row; splits depend on the content alone and do not leak."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datakit import Row, assistant, chat_rows, pair_rows, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from paft.data import check_leakage, content_hash, hold_out, load_rows, splits
from paft.errors import MismatchError, NotFoundError, UsageError
from paft.recipe import Splits

SYSTEM = {"role": "system", "content": "please"}


def load(tmp_path: Path, rows: list[Row], role: Any) -> list[Row]:
    return load_rows(str(write_jsonl(tmp_path / "rows.jsonl", rows)), role)


def refused(tmp_path: Path, rows: list[Row], role: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, rows, role)
    return caught.value


# Formats


@pytest.mark.parametrize(
    ("given_row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "extra": 1}, [{"prompt": "a", "completion": "b"}]),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, [{"prompt": [user("a")], "completion": [assistant("b")]}]),
        ({"text": "a b"}, [{"text": "a b"}]),
        ({"messages": [user("a"), assistant("b")]}, [{"prompt": [user("a")], "completion": [assistant("b")]}]),
        (
            {"prompt": "ignored", "messages": [user("a"), assistant("b")]},
            [{"prompt": [user("a")], "completion": [assistant("b")]}],
        ),
        (
            {"messages": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d"), user("e")]},
            [
                {"prompt": [SYSTEM, user("a")], "completion": [assistant("b")]},
                {"prompt": [SYSTEM, user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
            ],
        ),
        ({"messages": [user("a") | {"name": "x"}, assistant("b")]}, [{"prompt": [user("a")], "completion": [assistant("b")]}]),
    ],
)
def test_sft_formats(given_row: Row, expected: list[Row], tmp_path: Path) -> None:
    assert load(tmp_path, [given_row], "sft") == expected


def pair(prompt: Any, chosen: Any, rejected: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("given_row", "expected"),
    [
        (pair("a", "b", "c"), pair("a", "b", "c")),
        (pair([user("a")], [assistant("b")], [assistant("c")]), pair([user("a")], [assistant("b")], [assistant("c")])),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            pair([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (  # the shorter conversation ends where the other goes on: an answer must be left on both sides
            {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("b")]},
            pair([user("a")], [assistant("b"), user("c"), assistant("d")], [assistant("b")]),
        ),
        (  # UltraFeedback binarized: a prompt string beside whole conversations
            pair("a", [user("a"), assistant("b")], [user("a"), assistant("c")]),
            pair([user("a")], [assistant("b")], [assistant("c")]),
        ),
    ],
)
def test_preference_formats(given_row: Row, expected: Row, tmp_path: Path) -> None:
    assert load(tmp_path, [given_row], "pref") == [expected]


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    import pandas

    rows = [{"prompt": f"is {i} a", "completion": "yes"} for i in range(4)]
    table = pandas.DataFrame(rows)
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.csv", "a.parquet"):
        assert load_rows(str(tmp_path / name), "sft") == rows
    with jsonl.open("a") as file:
        file.write("\n\n")  # blank lines are no rows
    assert load_rows(str(jsonl), "sft") == rows


def test_a_directory_is_read_in_order_of_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "notes.md").write_text("no data")
    assert load_rows(str(tmp_path), "text") == [{"text": "one"}, {"text": "two"}]
    (tmp_path / "c.csv").write_text("text\nthree\n")
    with pytest.raises(UsageError, match="several kinds"):
        load_rows(str(tmp_path), "text")


def test_plain_text_is_cut_at_empty_lines_or_at_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\n\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert load_rows(str(tmp_path / "a.txt"), "text") == [{"text": "one\ntwo"}, {"text": "three"}]
    assert load_rows(str(tmp_path / "b.txt"), "text") == [{"text": "one"}, {"text": "two"}]


# Refusals


@pytest.mark.parametrize(("role", "row"), [("sft", {"question": "a", "answer": "b"}), ("sft", {"prompt": "a", "response": "b"}),
                                           ("pref", {"prompt": "a", "chosen": "b"}), ("text", {"body": "a"})])
def test_missing_columns_are_told_with_what_was_found(role: str, row: Row, tmp_path: Path) -> None:
    error = refused(tmp_path, [row], role)
    assert str(sorted(row)) in error.message and "row 1" in error.message
    assert "`" in (error.hint or "") and "expected" in (error.hint or "")


GOOD_SFT = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("role", "row", "said"),
    [
        ("sft", {"prompt": "a", "completion": " "}, "`completion` is empty"),
        ("sft", {"prompt": "a", "completion": None}, "must be strings"),
        ("sft", {"prompt": [user("a")], "completion": "b"}, "both be"),
        ("sft", {"prompt": [], "completion": [assistant("b")]}, "non-empty list"),
        ("sft", {"prompt": [user("a")], "completion": [assistant("")]}, "empty answer"),
        ("sft", {"messages": []}, "non-empty list"),
        ("sft", {"messages": "a"}, "non-empty list"),
        ("sft", {"messages": [user("a")]}, "no assistant turn"),
        ("sft", {"messages": [user("a"), assistant(" "), user("b")]}, "empty answer"),
        ("sft", {"messages": [{"role": "user"}, assistant("b")]}, "needs a `role` and a `content`"),
        ("sft", {"messages": [user("a"), {"role": "assistant", "content": None}]}, "needs a `role` and a `content`"),
        ("sft", {"text": "  "}, "`text` is empty"),
        ("pref", pair("a", "b", "b"), "identical"),
        ("pref", pair("a", "", "b"), "`chosen` is empty"),
        ("pref", pair("a", "b", ""), "`rejected` is empty"),
        ("pref", {"chosen": "a b", "rejected": "a c"}, "`prompt` is missing"),
        ("pref", {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "same message"),
        ("pref", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, "identical"),
    ],
)
def test_a_bad_row_is_refused_by_number(role: str, row: Row, said: str, tmp_path: Path) -> None:
    good = {"sft": [GOOD_SFT], "pref": [pair("a", "b", "c")]}[role]
    error = refused(tmp_path, [*good, row], role)
    assert "row 2" in error.message and said in error.message and "\n" not in error.message


@pytest.mark.parametrize(("line", "said"), [("{", "not JSON"), ("[1]", "not list"), ("3", "not int"), ("nul", "not JSON")])
def test_bad_json_is_told_with_its_line(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD_SFT) + f"\n\n{line}\n")
    with pytest.raises(UsageError, match=f"rows.jsonl:3: .*{said}"):
        load_rows(str(file), "sft")


def test_what_is_no_data(tmp_path: Path) -> None:
    for name in ("none.jsonl", "./none", "/none/at/all", "a/b/c", str(tmp_path / "none.parquet"), "no-such-org/no-such-data"):
        with pytest.raises(NotFoundError):
            load_rows(name, "sft")
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    for name in ("model.bin", "empty.jsonl", "latin.jsonl", "broken.parquet", "folder"):
        with pytest.raises(UsageError) as caught:
            load_rows(str(tmp_path / name), "text")
        assert name in caught.value.message and "\n" not in caught.value.message
    with pytest.raises(UsageError, match="demo:sfd"):
        load_rows("demo:sfd", "sft")
    with pytest.raises(UsageError):
        load_rows("demo:sft:tset", "sft")


# Splits


def keys(rows: list[Row]) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows}


@given(st.permutations(range(40)), st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_hold_out_depends_on_content_not_on_order(order: list[int], salt: int) -> None:
    rows = [{"prompt": f"p{i // 2}", "completion": f"c{i}"} for i in range(40)]
    kept, held = hold_out(rows, 0.3, str(salt))
    kept2, held2 = hold_out([rows[i] for i in order], 0.3, str(salt))
    assert (keys(kept), keys(held)) == (keys(kept2), keys(held2))
    assert not {row["prompt"] for row in kept} & {row["prompt"] for row in held}
    assert len(kept) + len(held) == 40


def test_hold_out_takes_about_its_fraction() -> None:
    rows = [{"text": f"row {i}"} for i in range(4000)]
    for fraction in (0.05, 0.25, 0.6):
        share = len(hold_out(rows, fraction)[1]) / 4000
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5
    assert hold_out(rows, 0.0) == (rows, [])
    assert hold_out(rows, 0.25, "a")[1] != hold_out(rows, 0.25, "b")[1]


def test_the_turns_of_one_conversation_stay_together(tmp_path: Path) -> None:
    later = [assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")]
    talks = [{"messages": [user(f"q{i}"), *later]} for i in range(60)]
    rows = load(tmp_path, talks, "sft")
    kept, held = hold_out(rows, 0.4)
    first = [{row["prompt"][0]["content"] for row in part} for part in (kept, held)]
    assert len(rows) == 180 and not first[0] & first[1]


def test_too_few_rows_to_split_are_refused() -> None:
    with pytest.raises(UsageError, match="too few"):
        hold_out([{"text": "one"}], 0.5)


@pytest.mark.parametrize(("role", "rows"), [("sft", chat_rows(120)), ("pref", pair_rows(120))])
def test_cut_splits_are_disjoint_and_complete(role: Any, rows: list[Row], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = splits(str(file), role)
    assert sorted(found) == ["test", "train", "validation"] and all(found.values())
    union = [row for part in found.values() for row in part]
    assert keys(union) == keys(load_rows(str(file), role)) and len(union) == len(rows)
    check_leakage(found)
    random.Random(1).shuffle(rows)
    again = splits(str(write_jsonl(file, rows)), role)
    assert {name: keys(part) for name, part in again.items()} == {name: keys(part) for name, part in found.items()}


def test_named_splits_are_used_as_they_are_and_may_not_leak(tmp_path: Path) -> None:
    rows = chat_rows(40)
    train, test = write_jsonl(tmp_path / "train.jsonl", rows[:30]), write_jsonl(tmp_path / "test.jsonl", rows[30:])
    found = splits(Splits(train=str(train), test=str(test)), "sft", 0.2)
    assert found["test"] == load_rows(str(test), "sft")
    assert len(found["train"]) + len(found["validation"]) == 30
    write_jsonl(test, rows[29:])
    with pytest.raises(MismatchError, match="the same row is in"):
        splits(Splits(train=str(train), test=str(test)), "sft", 0.2)


def test_the_demo_comes_with_its_own_splits() -> None:
    for role in ("sft", "pref"):
        found = splits(f"demo:{role}", role)  # type: ignore[arg-type]
        assert found["test"] == load_rows(f"demo:{role}:test", role)  # type: ignore[arg-type]
        check_leakage(found)


def test_content_hash_ignores_key_order_and_file_type_but_not_row_order() -> None:
    one, other = {"prompt": "a", "completion": "b"}, {"completion": "b", "prompt": "a"}
    assert content_hash([one]) == content_hash([other])
    assert content_hash([one, {"text": "x"}]) != content_hash([{"text": "x"}, one])
    assert content_hash([one]) != content_hash([one, one])
