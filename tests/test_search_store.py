"""A search behind a URL: the trials and the front of one on a disk; another machine goes on with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clikit import Capture, assert_one_error
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

from paft.cli import invoke
from paft.errors import MismatchError
from paft.store import check_sole, lease

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "one"))


@pytest.fixture
def line(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> list[str]:
    held = [write_jsonl(tmp_path / "sft.jsonl", chat_rows(12)), write_jsonl(tmp_path / "pref.jsonl", pair_rows(12))]
    adapters = [make_adapter(tiny_base, seed).as_uri() for seed in (1, 2)]
    return ["search", *adapters, "--sft-data", str(held[0]), "--pref-data", str(held[1]), "--base", str(tiny_base), "-q"]


def all_of(out: Path) -> list[list[object]]:
    report = json.loads((out / "front.json").read_text())
    return [report["all"], report["front"], report["others"]]


def test_a_search_behind_a_url_goes_on_on_another_machine(line: list[str], tmp_path: Path, capsys: Capture,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    disk, bucket = tmp_path / "disk", tmp_path / "bucket" / "found"
    assert invoke([*line, "--trials", "14", "-o", str(disk)]) == 0
    assert invoke([*line, "--trials", "6", "-o", bucket.as_uri()]) == 0, capsys.readouterr().err
    assert len(all_of(bucket)[0]) == 6 and (bucket / "front.png").stat().st_size > 10_000
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "two"))
    again = [*line, "--trials", "14", "-o", bucket.as_uri()]
    capsys.readouterr()
    assert_one_error(capsys, invoke(again), 3, "found is not empty")
    assert_one_error(capsys, invoke([*again, "--overwrite"]), 3, "found.journal exists")
    other = f"{bucket.as_uri()}.journal is a study with another beta"
    assert_one_error(capsys, invoke([*again, "--resume", "--beta", "0.5"]), 3, other)
    assert len(all_of(bucket)[0]) == 6
    assert invoke([*again, "--resume"]) == 0
    assert all_of(bucket) == all_of(disk)
    assert invoke(["verify", bucket.as_uri()]) == 0


def test_what_a_killed_search_has_tried_is_behind_the_url(line: list[str], tmp_path: Path, capsys: Capture,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "bucket" / "found.journal"
    command = [sys.executable, "-m", "paft", *line, "--trials", "100000", "-o", journal.with_suffix("").as_uri()]
    search = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not journal.is_file() or journal.read_bytes().count(b'"scores"') < 3:
            assert time.monotonic() < end and search.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(search.pid, signal.SIGKILL)
        search.communicate()
    assert journal.read_bytes().endswith(b"\n")
    before = journal.read_bytes().count(b'"scores"')
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    assert invoke([*command[3:], "--resume", "--trials", str(before + 2)]) == 0, capsys.readouterr().err
    assert len(all_of(journal.with_suffix(""))[0]) == before + 2


def test_a_journal_is_sent_in_whole_lines_and_by_its_driver_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paft.errors import ResourceError
    from paft.search.journal import journal_of
    from paft.store import NOTE, Bucket, Store, making

    out, there = Store(f"file://{tmp_path}/bucket/found"), tmp_path / "bucket" / "found.journal"
    with pytest.raises(OSError, match="full"), journal_of(out, resume=False) as file:
        file.write_bytes(b'{"a":1}\n{"b"')
        raise OSError("disk full")
    assert there.read_bytes() == b'{"a":1}\n'
    with journal_of(out, resume=True) as file:
        assert file.read_bytes() == b'{"a":1}\n'  # or the next record would be glued to the torn one

    def away(self: Bucket, name: str, data: bytes) -> None:
        raise ResourceError("the service is away")

    with pytest.raises(KeyboardInterrupt), journal_of(out, resume=True) as file, monkeypatch.context() as patch:
        file.write_bytes(b'{"a":1}\n{"b":2}\n')
        patch.setattr(Bucket, "write", away)
        raise KeyboardInterrupt
    with (pytest.raises(MismatchError, match="another process"), making(out, overwrite=False, resume=True),
          journal_of(out, resume=True) as file):
        file.write_bytes(b'{"a":1}\n{"c":3}\n')
        out.bucket.write(NOTE, b'{"id": "x"}')
        there.write_bytes(b"the other's")
        with pytest.raises(MismatchError):
            check_sole(out.bucket)
    assert there.read_bytes() == b"the other's"


def test_a_study_has_no_url_of_its_own(line: list[str], tmp_path: Path, capsys: Capture) -> None:
    there = ["--study", "s3://bucket/x.journal", "-o", str(tmp_path / "out")]
    assert_one_error(capsys, invoke([*line, *there]), 2, "a file on a disk")
    assert_one_error(capsys, invoke([*line, "--study", "x.db", "-o", f"file://{tmp_path}/b/out"]), 2, "beside it")
    assert not (tmp_path / "out").exists() and not (tmp_path / "b").exists()


def test_a_point_s_recipe_is_merged_by_its_url(line: list[str], tmp_path: Path, capsys: Capture) -> None:
    """As the search's last line says."""
    url = f"file://{tmp_path}/bucket/found"
    assert invoke([*line, "--trials", "2", "-o", url]) == 0
    told = next(part for part in capsys.readouterr().out.split() if part.endswith(".yaml"))
    assert told.startswith(url) and invoke(["merge", "-c", told, "-o", str(tmp_path / "merged"), "-q"]) == 0
    capsys.readouterr()
    assert_one_error(capsys, invoke(["merge", "-c", f"{url}/none.yaml", "-o", str(tmp_path / "other")]), 4, "none.yaml")
