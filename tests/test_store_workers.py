"""Workers that share no disk with the driver put the files of a merge behind a URL: the bytes of one machine."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, assert_one_error
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl
from storekit import FULL, files_of, manifest

from paft.cli import invoke
from paft.errors import ResourceError
from paft.merge import spread
from paft.merge.engine import merge
from paft.store import Bucket
from paft.store.artefacts import LIST

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("cache")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster whose workers keep their files in another place than the driver; that place."""
    from ray import cloudpickle

    cache = tmp_path_factory.mktemp("workers")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before, here = os.environ.get("PAFT_CACHE"), Path.cwd()
    os.environ["PAFT_CACHE"] = str(cache)
    os.chdir(ROOT)  # workers import paft from where the driver stands
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL",
             object_store_memory=80 << 20)
    os.environ.pop("PAFT_CACHE")
    if before:
        os.environ["PAFT_CACHE"] = before
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield cache
    ray.shutdown()
    os.chdir(here)


@pytest.fixture(scope="module")
def inputs(sharded: Path, make_adapter: AdapterFactory, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter with a tensor that it replaces, and a fine-tuned model."""
    tuned = tmp_path_factory.mktemp("tuned") / "tuned"
    merge([str(make_adapter(sharded, 3))], base=str(sharded), method="linear", parameters={}, weights=None, out=tuned)
    return [make_adapter(sharded, 1, modules_to_save=["embed_tokens"]), tuned]


def line_of(inputs: list[Path], base: Path, *more: str) -> list[str]:
    return ["merge", *(path.as_uri() for path in inputs), "--base", base.as_uri(), "-q", *more]


def test_workers_without_a_shared_disk(inputs: list[Path], sharded: Path, tmp_path: Path, workers: Path, capsys: Capture) -> None:
    here, there = tmp_path / "here", tmp_path / "bucket" / "out"
    line = line_of(inputs, sharded, *FULL, "-p", "scope=global", "--dtype", "bfloat16")
    assert invoke([*line, "-o", str(here)]) == 0
    assert invoke([*line, "-o", there.as_uri(), "--executor", "ray"]) == 0, capsys.readouterr().err
    assert "checked: it loads" in capsys.readouterr().out
    assert files_of(there) == files_of(here) and len(list(there.glob("*.safetensors"))) >= 4
    assert manifest(there) == manifest(here) and invoke(["verify", str(there)]) == 0
    assert json.loads((there / LIST).read_text())["files"].keys() == {file.name for file in there.iterdir()} - {LIST}
    assert not list(workers.rglob("*.safetensors"))
    capsys.readouterr()
    again = [*line, "-o", there.as_uri(), "--executor", "ray"]
    assert_one_error(capsys, invoke(again), 3, "out is not empty")
    assert invoke([*again, "--resume"]) == 0 and "tensors merged" in capsys.readouterr().out  # it is finished
    assert_one_error(capsys, invoke([*again, "--resume", "--seed", "3"]), 3, "and not from this: its seed differs")
    assert_one_error(capsys, invoke([*line_of(inputs, sharded, "--executor", "ray", "--overwrite", "-o"), sharded.as_uri()]), 3,
                     "holds an input")


def test_a_search_by_workers_without_a_shared_disk(inputs: list[Path], sharded: Path, tmp_path: Path, workers: Path,
                                                   capsys: Capture) -> None:
    """They write the study on the driver's machine; it goes behind the URL with its front."""
    held = [write_jsonl(tmp_path / "sft.jsonl", chat_rows(8)), write_jsonl(tmp_path / "pref.jsonl", pair_rows(8))]
    line = ["search", inputs[0].as_uri(), inputs[1].as_uri(), "--base", sharded.as_uri(), "-q", "--json",
            "--sft-data", str(held[0]), "--pref-data", str(held[1]), "-o", f"file://{tmp_path}/bucket/found"]
    assert invoke([*line, "--trials", "5", "--executor", "ray", "--workers", "2"]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert 5 <= report["trials"] <= 6  # a worker that has begun one ends it
    assert {file.name for file in (tmp_path / "bucket" / "logs").iterdir()} == {"found-1.log", "found-2.log"}
    assert not list(workers.rglob("*.journal"))
    assert invoke([*line, "--trials", str(report["trials"]), "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["all"], again["front"]) == (report["all"], report["front"])


def killed_while_sending(mark: Path, job: Any, out: Any, file: str) -> Any:
    """`spread._write`, whose first worker is killed when half of its file is behind the URL."""
    def put(self: Bucket, source: Path, name: str) -> None:
        self.write(name, source.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return spread._write(job, out, file)
    (mark.parent / "seen").write_text(" ".join(out.bucket.files()))
    Bucket.put = put
    return spread._write(job, out, file)


def stopped(log: Path, last: int, job: Any, out: Any, file: str) -> Any:
    """`spread._write`, told in ``log``; after ``last`` files the disk is full."""
    with log.open("a") as stream:
        stream.write(f"{file}\n")
    if len(log.read_text().split()) > last:
        raise ResourceError("disk full")
    return spread._write(job, out, file)


@pytest.mark.parametrize("spoil", ["nothing", "file", "seed"])
def test_a_merge_behind_a_url_goes_on_by_the_file(spoil: str, inputs: list[Path], sharded: Path, tmp_path: Path, capsys: Capture,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    there, log = tmp_path / "bucket" / "out", tmp_path / "log"
    line = line_of(inputs, sharded, "--method", "dare_ties", "-p", "density=0.5", "--no-check", "--executor", "ray", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(spread, "_write", partial(stopped, log, 2))
        assert_one_error(capsys, invoke([*line, "-o", there.as_uri()]), 5, "disk full")
    first = log.read_text().split()[:2]
    assert {file.name for file in there.iterdir()} == {*first, ".work"}
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "another"))
    if spoil == "file":
        (there / first[0]).write_bytes((there / first[0]).read_bytes()[:-1])
    (there / "model-00099-of-00099.safetensors").write_bytes(b"of another base")
    again = [*line, *(["--seed", "7"] if spoil == "seed" else [])]
    log.unlink()
    monkeypatch.setattr(spread, "_write", partial(stopped, log, 100))
    assert invoke([*again, "-o", there.as_uri()]) == 0, capsys.readouterr().err
    assert set(first) & set(log.read_text().split()) == {"nothing": set(), "file": {first[0]}, "seed": set(first)}[spoil]
    monkeypatch.undo()
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "another"))
    here = tmp_path / "here"
    assert invoke([*again, "-o", str(here)]) == 0 and files_of(there) == files_of(here) and manifest(there) == manifest(here)
    assert "model-00099-of-00099.safetensors" not in json.loads((there / LIST).read_text())["files"]


def fails(job: Any, out: Any, file: str) -> Any:
    spread._write(job, out, file)
    raise OSError("a disk is broken")


def test_a_killed_worker_and_a_failed_merge(inputs: list[Path], sharded: Path, tmp_path: Path, capsys: Capture,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    line = line_of(inputs, sharded, *FULL, "--no-check")
    there = tmp_path / "bucket" / "out"
    assert invoke([*line, "-o", str(tmp_path / "here")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(spread, "_write", fails)
        capsys.readouterr()
        assert invoke([*line, "-o", there.as_uri(), "--executor", "ray"]) != 0
        assert capsys.readouterr().err.count("error:") == 1 and not there.exists()
    monkeypatch.setattr(spread, "_write", partial(killed_while_sending, tmp_path / "mark"))
    assert invoke([*line, "-o", there.as_uri(), "--executor", "ray"]) == 0, capsys.readouterr().err
    assert (tmp_path / "mark").exists() and LIST not in (tmp_path / "seen").read_text()
    assert files_of(there) == files_of(tmp_path / "here")
