"""What is cut or changes behind a URL, and what stands there already: one line, and nothing that looks finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory
from storekit import Reads, watch

from paft.checkpoint import Checkpoint
from paft.cli import invoke
from paft.errors import MismatchError, ResourceError
from paft.hub import MODEL_FILES
from paft.merge import writer
from paft.provenance import content_hash
from paft.store import Bucket, Ranged, fetched, ranged
from paft.store.artefacts import LIST

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def pair(sharded: Path, make_adapter: AdapterFactory) -> list[Path]:
    return [make_adapter(sharded, 1), make_adapter(sharded, 2)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return watch(monkeypatch)


@pytest.fixture
def bucket(sharded: Path, tmp_path: Path) -> Path:
    shutil.copytree(sharded, tmp_path / "bucket" / "base")
    return tmp_path / "bucket"


def spoil(file: Path, how: str) -> None:
    data = file.read_bytes()
    file.unlink() if how == "gone" else file.write_bytes(data[:-100] if how == "cut" else data[:-4] + b"\0\0\0\0")


def nothing_made(tmp_path: Path) -> bool:
    return not (tmp_path / "bucket" / "out").exists() and not list((tmp_path / "cache" / "trees").rglob("*.safetensors"))


def test_a_cut_file(bucket: Path, pair: list[Path], tmp_path: Path, capsys: Capture) -> None:
    spoil(sorted((bucket / "base").glob("*.safetensors"))[1], "cut")
    line = ["merge", *map(str, pair), "--base", (bucket / "base").as_uri(), "-o", (bucket / "out").as_uri(), "-q"]
    assert_one_error(capsys, invoke(line), 3, "is not a complete safetensors file")
    assert nothing_made(tmp_path)


@pytest.mark.parametrize(("how", "code"), [("cut", 3), ("changed", 3), ("gone", 4)])
def test_a_file_that_changes_meanwhile(how: str, code: int, bucket: Path, pair: list[Path], tmp_path: Path, capsys: Capture,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = writer.write_tensors

    def write(*args: Any, **more: Any) -> Any:
        spoil(sorted((bucket / "base").glob("*.safetensors"))[-1], how)
        return real(*args, **more)

    monkeypatch.setattr(writer, "write_tensors", write)
    line = ["merge", *map(str, pair), "--base", (bucket / "base").as_uri(), "-o", (bucket / "out").as_uri(), "-q", "--no-check"]
    assert_one_error(capsys, invoke(line), code, "no file:///" if how == "gone" else "has changed while it was read")
    assert nothing_made(tmp_path)


def test_a_base_of_other_content_is_refused_when_it_is_read(bucket: Path, pair: list[Path], tmp_path: Path, capsys: Capture,
                                                            reads: Reads) -> None:
    one = shutil.copytree(pair[0], tmp_path / "one")
    line = ["merge", str(one), "--base", (bucket / "base").as_uri(), "-o", (bucket / "out").as_uri(), "-q", "--no-check",
            "--method", "linear"]
    (one / "paft.json").write_text(json.dumps({"base": {"content_sha256": "0" * 64}}))
    assert_one_error(capsys, invoke(line), 3, "was trained on a base of content 000000000000")
    assert nothing_made(tmp_path)
    (one / "paft.json").write_text(json.dumps({"base": {"content_sha256": content_hash(bucket / "base")}}))
    reads.clear()
    ranged._block.cache_clear()
    assert invoke(line) == 0
    size = sum(file.stat().st_size for file in (bucket / "base").glob("*.safetensors"))
    assert sum(stop - start for _, start, stop in reads if start) < size  # hashed as it is merged


# Targets


def test_what_stands_there_is_kept_or_replaced(bucket: Path, pair: list[Path], capsys: Capture) -> None:
    out = bucket / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    line = ["merge", *map(str, pair), "--base", (bucket / "base").as_uri(), "-q", "--no-check", "-o"]
    assert_one_error(capsys, invoke([*line, out.as_uri()]), 3, "out is not empty")
    assert_one_error(capsys, invoke([*line, out.as_uri(), "--resume"]), 3, "out is not empty")
    assert_one_error(capsys, invoke([*line, out.as_uri(), "--dry-run"]), 3, "out is not empty")
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    for holder in (bucket, bucket / "base"):
        assert_one_error(capsys, invoke([*line, holder.as_uri(), "--overwrite"]), 3, "holds an input")
        delta = ["delta", str(pair[0]), "--base", (bucket / "base").as_uri(), "-q", "-o", holder.as_uri(), "--overwrite"]
        assert_one_error(capsys, invoke(delta), 3, "holds an input")
    assert_one_error(capsys, invoke([*line, "s3://bucket"]), 2, "s3://bucket has no directory above it")
    assert invoke([*line, out.as_uri(), "--overwrite"]) == 0
    assert not (out / "mine.txt").exists() and (out / LIST).is_file()
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    assert invoke([*line, out.as_uri(), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == out.as_uri()
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_what_could_not_be_sent_is_not_there_and_goes_on(bucket: Path, pair: list[Path], capsys: Capture,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["merge", *map(str, pair), "--base", str(bucket / "base"), "-q", "--no-check", "-o", (bucket / "out").as_uri()]
    real, sent = Bucket.put, []

    def put(self: Bucket, file: Path, name: str) -> None:
        if len(sent) == 3:
            raise ResourceError("no answer")
        sent.append(name)
        real(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", put)
        assert_one_error(capsys, invoke(line), 5, "no answer")
    assert len(list((bucket / "out").iterdir())) == 3 and not (bucket / "out" / LIST).exists()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", None)  # it is made already
        assert invoke([*line, "--resume"]) == 0
    assert invoke(["verify", str(bucket / "out")]) == 0 and (bucket / "out" / LIST).is_file()


def test_trainings_and_deltas_go_to_urls(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, capsys: Capture) -> None:
    world = World(tiny_base, make_adapter, tmp_path)
    out = tmp_path / "bucket" / "sft"
    line = ["train-sft", "-m", str(tiny_base), "-d", str(world.chat), "-q", "--set", "trainer.max_steps=2", "-o"]
    assert invoke([*line, str(tmp_path / "here")]) == 0
    assert invoke([*line, out.as_uri()]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == (tmp_path / "here" / "adapter_model.safetensors").read_bytes()
    assert (out / LIST).is_file() and invoke([*line, out.as_uri(), "--resume"]) == 0
    capsys.readouterr()
    assert_one_error(capsys, invoke([*line, out.as_uri()]), 3, "sft is not empty")
    assert invoke(["delta", out.as_uri(), "--base", str(tiny_base), "-q", "-o", f"{out.as_uri()}-delta"]) == 0
    assert invoke(["delta", str(out), "--base", str(tiny_base), "-q", "-o", str(tmp_path / "delta")]) == 0
    name = "delta.safetensors"
    assert (tmp_path / "bucket" / "sft-delta" / name).read_bytes() == (tmp_path / "delta" / name).read_bytes()
    assert (tmp_path / "bucket" / "sft-delta" / LIST).is_file()
    capsys.readouterr()
    assert not os.path.exists("/nowhere")


def test_a_range_beyond_what_was_promised(bucket: Path) -> None:
    opened = Checkpoint.open(fetched((bucket / "base").as_uri(), MODEL_FILES, weights=False))
    entry = [*opened.entries.values()][-1]
    assert isinstance(entry.file, Ranged) and not entry.file.parent.joinpath(entry.file.name).exists()
    spoil(bucket / "base" / entry.file.name, "cut")
    with pytest.raises(MismatchError, match="has changed while it was read"):
        opened.tile(entry.name, 0, entry.rows)
