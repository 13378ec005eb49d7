"""Bad rows, mixtures, streams: what is read, what is told, and what stops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datakit import Row, assistant, chat_rows, pair_rows, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from paft.data import Reading, Stream, check_leakage, content_hash, dataset, load_rows, open_stream, splits
from paft.data.load import mix
from paft.data.rows import row_key
from paft.errors import MismatchError, UsageError
from paft.recipe import DataSource, Splits

GOOD, BAD = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}


def numbered(name: str, count: int) -> list[Row]:
    return [{"prompt": f"{name}{i}", "completion": "yes"} for i in range(count)]


@pytest.fixture
def told() -> list[str]:
    return []


def test_bad_rows_are_counted_and_refused_or_dropped(tmp_path: Path, told: list[str]) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", [GOOD, BAD, {**GOOD, "prompt": "c"}, {"prompt": "d", "completion": None}]))
    with pytest.raises(UsageError) as caught:
        load_rows(file, "sft")
    assert "row 2: `completion` is empty (2 of 4 rows are bad)" in caught.value.message
    assert "--drop-bad-rows" in str(caught.value.hint)
    kept = load_rows(file, "sft", how=Reading(on_bad_row="drop", note=told.append))
    assert [row["prompt"] for row in kept] == ["a", "c"]
    assert told == [f"{file}: 2 of 4 rows dropped; the first is row 2: `completion` is empty"]
    write_jsonl(Path(file), [BAD, BAD])
    with pytest.raises(UsageError, match="2 of 2 rows are bad"):
        load_rows(file, "sft", how=Reading(on_bad_row="drop"))
    write_jsonl(Path(file), [{"question": "x", "answer": "y"}, GOOD])
    with pytest.raises(UsageError, match="row 1: it has columns"):  # not a bad row: the columns are not understood
        load_rows(file, "sft", how=Reading(on_bad_row="drop"))


def test_repetitions_and_unused_keys_are_told(tmp_path: Path, told: list[str]) -> None:
    turns = [{**user("a"), "name": "kim", "id": 3}, {**assistant("b"), "name": None}]
    file = str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}] * 3))
    assert len(load_rows(file, "sft", how=Reading(note=told.append))) == 3
    assert told == [f"{file}: 2 of 3 rows are repetitions of another", f"{file}: keys of messages that are not used: id, name"]


def test_one_training_takes_one_form(tmp_path: Path) -> None:
    chat = {"prompt": [user("a")], "completion": [assistant("b")]}
    file = str(write_jsonl(tmp_path / "a.jsonl", [GOOD, chat]))
    with pytest.raises(UsageError, match=r"a.jsonl holds strings and messages"):
        load_rows(file, "sft")
    one, two = (str(write_jsonl(tmp_path / f"{i}.jsonl", [row])) for i, row in enumerate((GOOD, chat)))
    with pytest.raises(UsageError, match=r"0.jsonl holds strings, .*1.jsonl holds messages"):
        load_rows([one, two], "sft")
    mapped = DataSource(source=one, columns={"user": "prompt", "assistant": "completion"})
    assert load_rows([mapped, two], "sft") == [chat, chat]


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 5)), min_size=1, max_size=4), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_a_mixture_is_the_largest_of_its_shares_without_a_repetition(spec: list[tuple[int, float]], seed: int) -> None:
    parts = [DataSource(source=str(i), weight=weight) for i, (_, weight) in enumerate(spec)]
    sets = [numbered(f"{i}-", count) for i, (count, _) in enumerate(spec)]
    used = mix(parts, sets, Reading(seed=seed))
    shares = [weight / sum(weight for _, weight in spec) for _, weight in spec]
    total = min(count / share for (count, _), share in zip(spec, shares, strict=True))
    for some, rows, share in zip(used, sets, shares, strict=True):
        assert abs(len(some) - total * share) <= max(0.5 + 1e-9, 1 - total * share)  # at least one row of each
        places = [rows.index(row) for row in some]
        assert places == sorted(set(places))
    assert any(len(some) == len(rows) for some, rows in zip(used, sets, strict=True))
    assert used == mix(parts, sets, Reading(seed=seed))


def test_mixtures_from_files(tmp_path: Path, told: list[str]) -> None:
    one, two = (str(write_jsonl(tmp_path / f"{name}.jsonl", numbered(name, count))) for name, count in (("a", 40), ("b", 300)))
    assert len(load_rows([one, two], "sft")) == 340
    spec: list[Any] = [DataSource(source=one, weight=0.2), DataSource(source=two, weight=0.8)]
    rows = load_rows(spec, "sft", how=Reading(seed=1, note=told.append))
    assert Counter(row["prompt"][0] for row in rows) == {"a": 40, "b": 160}
    assert told == [f"mixed 40 of 40 rows of {one}, 160 of 300 rows of {two}"]
    again, other = (load_rows(spec, "sft", how=Reading(seed=seed)) for seed in (1, 2))
    assert again == rows != other
    assert [row["prompt"] for row in load_rows([DataSource(source=two, rows=3)], "sft")] == ["b0", "b1", "b2"]
    with pytest.raises(UsageError, match="some have none"):
        load_rows([DataSource(source=one, weight=1.0), two], "sft")
    found = splits(Splits(train=spec, test=[DataSource(source=str(write_jsonl(tmp_path / "c.jsonl", numbered("c", 9))))]), "sft")
    assert len(found["test"]) == 9 and len(found["train"]) + len(found["validation"]) == 200


def test_prompts_that_come_again_in_the_evaluation_are_told(told: list[str]) -> None:
    held = [{"prompt": "a", "completion": "c"}, {"prompt": "x", "completion": "c"}]
    check_leakage({"training data": [GOOD], "evaluation data": held}, told.append)
    assert told == ["1 of 2 rows of the evaluation data have a prompt that is trained on, with another answer"]
    with pytest.raises(MismatchError, match="the same row"):
        check_leakage({"training data": [GOOD], "evaluation data": [*held, GOOD]}, told.append)


# Streams


def test_a_stream_holds_all_rows_once_in_an_order_of_its_seed(tmp_path: Path, told: list[str]) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", chat_rows(60)))
    rows = load_rows(file, "sft")
    stream = open_stream(file, "sft", Reading(seed=3, note=told.append), [])
    assert isinstance(stream, Stream) and list(stream) == rows and "the first 60 rows are checked" in told[0]
    seen = list(dataset(stream))
    assert seen != rows and sorted(map(row_key, seen)) == sorted(map(row_key, rows))
    assert seen == list(dataset(open_stream(file, "sft", Reading(seed=3), [])))
    assert seen != list(dataset(open_stream(file, "sft", Reading(seed=4), [])))
    assert content_hash(stream) != content_hash(rows) and content_hash(stream).endswith(content_hash(rows))


def test_a_long_stream_is_checked_at_its_head_and_stops_where_it_breaks(tmp_path: Path) -> None:
    many = numbered("a", 1500)
    file = str(write_jsonl(tmp_path / "a.jsonl", [*many, BAD]))
    stream = open_stream(file, "sft", Reading(), [])
    assert len(stream) == 1000
    with pytest.raises(UsageError, match="row 1501: `completion` is empty"):
        list(dataset(stream))
    dropped = open_stream(file, "sft", Reading(on_bad_row="drop"), [])
    assert len(list(dataset(dropped))) == 1500
    with pytest.raises(UsageError, match="row 1: "):
        open_stream(str(write_jsonl(tmp_path / "b.jsonl", [BAD])), "sft", Reading(), [])
    with pytest.raises(MismatchError, match="row 1301 is in the evaluation data"):
        list(dataset(open_stream(file, "sft", Reading(), [many[1300]])))


def test_streams_are_joined_and_mixed(tmp_path: Path) -> None:
    one, two = (str(write_jsonl(tmp_path / f"{name}.jsonl", numbered(name, 400))) for name in "ab")
    assert len(list(dataset(open_stream([one, two], "sft", Reading(), [])))) == 800
    parts: list[Any] = [DataSource(source=one, weight=1.0), DataSource(source=two, weight=4.0)]
    drawn = Counter(row["prompt"][0] for row in dataset(open_stream(parts, "sft", Reading(seed=5), [])))
    assert drawn["b"] == 400 and 60 < drawn["a"] < 140  # until one is exhausted: binomial, mean 100, deviation 10
    assert len(list(dataset(open_stream([DataSource(source=one, rows=7)], "sft", Reading(), [])))) == 7
    assert len(open_stream(str(write_jsonl(tmp_path / "p.jsonl", pair_rows(5))), "pref", Reading(), [])) == 5
