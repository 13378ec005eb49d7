"""Rows are read as they stand from every kind of file, whatever packs it, and no split is taken for another."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from datakit import Row, write_jsonl
from datasets import Dataset, DatasetDict

from paft.data.sources import Place, read
from paft.errors import NotFoundError, ResourceError, UsageError

ANSWERS = ["42", "None", "a, b", 'say "x"', "line\nbreak", " ", "é"]
ROWS: list[Row] = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(ANSWERS)]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name:train[:10%]", ("org/name", None, None, "train[:10%]")),
        ("org/name@main", ("org/name", "main", None, None)),
        ("org/name@refs/pr/1#en:test", ("org/name", "refs/pr/1", "en", "test")),
        ("name#en", ("name", None, "en", None)),
    ],
)
def test_the_parts_of_a_source(source: str, parts: tuple[str | None, ...]) -> None:
    place = Place.parse(source)
    assert (place.name, place.revision, place.subset, place.split) == parts


def test_a_path_that_exists_is_a_path_whatever_its_name(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a@b#c:d.jsonl", ROWS)
    assert list(read(str(file))) == ROWS
    assert list(read(f"{file}:train[1:3]")) == ROWS[1:3]


@pytest.mark.parametrize(("suffix", "packer"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_packed_files(suffix: str, packer: object, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(packer.compress(text))  # type: ignore[attr-defined]
    assert list(read(str(file))) == ROWS
    file.write_bytes(b"no archive")
    with pytest.raises(UsageError, match="cannot read"):
        list(read(str(file)))


def test_zstd_says_what_it_needs(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    from fsspec.compression import compr

    if "zstd" in compr:
        pytest.skip("zstandard is here")
    (tmp_path / "rows.jsonl.zst").write_bytes(b"")
    with pytest.raises(ResourceError, match="zstd"):
        list(read(str(tmp_path / "rows.jsonl.zst")))


def test_tables_keep_text_as_it_is(tmp_path: Path) -> None:
    """A reader that guesses types would make 42 a number and None nothing."""
    import csv

    for name, dialect in (("a.csv", "excel"), ("a.tsv", "excel-tab")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], dialect=dialect)
            writer.writeheader()
            writer.writerows(ROWS)
        assert list(read(str(tmp_path / name))) == ROWS
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert list(read(str(tmp_path / "a.parquet"))) == ROWS
    for line in ("1,2,3\n", "1\n"):
        (tmp_path / "b.csv").write_text("prompt,completion\n" + line)
        with pytest.raises(UsageError, match=r"row 1 has (more|fewer) cells"):
            list(read(str(tmp_path / "b.csv")))


def test_json_is_a_list_of_objects_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    mixed: list[Row] = [{"messages": [{"role": "user", "content": "a", "name": "x"}]}, {"messages": "text", "more": 1}]
    for text in (json.dumps(mixed), json.dumps(mixed, indent=2), "".join(json.dumps(row) + "\n" for row in mixed)):
        file.write_text(text)
        assert list(read(str(file))) == mixed
    file.write_text(json.dumps(mixed[1]))
    assert list(read(str(file))) == mixed[1:]
    for text, said in (('{"rows":\n [1]}', "no list of objects"), ("[1, 2]", "no list of objects"), ("[{", "not JSON")):
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            list(read(str(file)))


def test_a_directory_with_several_splits_must_be_told_which(tmp_path: Path) -> None:
    for name, part in (("train-00000", ROWS[:4]), ("train-00001", ROWS[4:5]), ("test", ROWS[5:])):
        Dataset.from_list(part).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(UsageError, match="several splits") as caught:
        list(read(str(tmp_path)))
    assert f"{tmp_path}:train" in str(caught.value.hint)
    assert list(read(f"{tmp_path}:train")) == ROWS[:5]
    assert list(read(f"{tmp_path}:test", streaming=True)) == ROWS[5:]
    assert list(read(f"{tmp_path}:train[:2]")) == ROWS[:2]
    with pytest.raises(UsageError, match="cannot read"):
        list(read(f"{tmp_path}:dev"))
    (tmp_path / "test.parquet").unlink()
    assert list(read(str(tmp_path))) == ROWS[:5]
    (tmp_path / "words").mkdir()
    for name in ("latest.jsonl", "contest.jsonl", "training.jsonl"):  # of two of these, "test" is only in the word
        write_jsonl(tmp_path / "words" / name, ROWS[:1])
    assert len(list(read(str(tmp_path / "words")))) == 3


def test_a_downloaded_repository_is_read_by_its_card(tmp_path: Path) -> None:
    """The same call to `datasets` as for the hub: subset, split and streaming."""
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [{"text": name}])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: en/train.jsonl\n"
                                        "- config_name: de\n  data_files: de/train.jsonl\n---\n")
    assert list(read(f"{tmp_path}#de")) == [{"text": "de"}]
    assert list(read(f"{tmp_path}#en:train", streaming=True)) == [{"text": "en"}]
    with pytest.raises(UsageError, match="cannot read"):
        list(read(f"{tmp_path}#fr"))


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    held = Dataset.from_list(ROWS)
    held.save_to_disk(tmp_path / "one")
    DatasetDict({"train": held, "test": held.select([0])}).save_to_disk(tmp_path / "two")
    assert list(read(str(tmp_path / "one"))) == list(read(str(tmp_path / "two"))) == ROWS
    assert list(read(f"{tmp_path / 'two'}:test")) == ROWS[:1]
    with pytest.raises(UsageError, match="no split 'tset'"):
        list(read(f"{tmp_path / 'two'}:tset"))


@pytest.mark.parametrize("split", ["test", "train[", "train[:x]", "train[:10%]more"])
def test_a_slice_that_a_file_does_not_have(split: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UsageError, match="no part of a file"):
        list(read(f"{file}:{split}"))
    with pytest.raises(NotFoundError, match="no data at"):
        list(read(f"{tmp_path}/none.jsonl:train"))
