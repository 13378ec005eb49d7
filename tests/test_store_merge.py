"""Merges from and to URLs: the bytes of a merge on one disk, weights read by ranges, and what must not look finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from clikit import Capture
from conftest import AdapterFactory
from storekit import FULL, Reads, files_of, manifest, watch

from paft.adapter import label
from paft.checkpoint import Checkpoint
from paft.cli import invoke
from paft.delta import tile_rows
from paft.hub import MODEL_FILES
from paft.merge import spread
from paft.merge.engine import merge
from paft.merge.inputs import open_inputs
from paft.merge.job import Job
from paft.merge.settings import Settings, native
from paft.provenance import content_hash
from paft.store import fetched, weight_files
from paft.store.artefacts import LIST

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tuned(sharded: Path, make_adapter: AdapterFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model."""
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    merge([str(make_adapter(sharded, 3))], base=str(sharded), method="linear", parameters={}, weights=None, out=out)
    return out


@pytest.fixture(scope="module")
def pair(sharded: Path, make_adapter: AdapterFactory) -> list[Path]:
    return [make_adapter(sharded, 1), make_adapter(sharded, 2)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return watch(monkeypatch)


@pytest.mark.parametrize("more", [
    FULL, [*FULL, "-p", "scope=global"], [*FULL, "--dtype", "bfloat16"], ["--method", "linear", "--output-kind", "lora"],
    [*FULL, "--output-kind", "delta"], ["--method", "dare_ties", "-p", "density=0.5"],
], ids=["full", "global", "bfloat16", "lora", "delta", "dare"])
def test_a_merge_between_urls_is_the_merge_on_a_disk(more: list[str], sharded: Path, tuned: Path, pair: list[Path],
                                                     tmp_path: Path, cache: Path, capsys: Capture) -> None:
    inputs = pair if "lora" in more else [pair[0], tuned]
    here, there = tmp_path / "here", tmp_path / "bucket" / "out"
    options = ["--no-check", "-q", *more]
    assert invoke(["merge", *map(str, inputs), "--base", str(sharded), "-o", str(here), *options]) == 0
    line = ["merge", *(path.as_uri() for path in inputs), "--base", sharded.as_uri(), "-o", there.as_uri(), *options]
    assert invoke(line) == 0, capsys.readouterr().err
    wanted, found = files_of(here), files_of(there)
    if "lora" in more:  # the configuration names the base
        wanted.pop("adapter_config.json"), found.pop("adapter_config.json")
    if "delta" in more:
        wanted.pop("paft_delta.json"), found.pop("paft_delta.json")
    assert found == wanted and any(name.endswith(".safetensors") for name in found)
    assert manifest(there)["content_sha256"] == manifest(here)["content_sha256"]
    assert manifest(there)["base"] == manifest(here)["base"]
    assert json.loads((there / LIST).read_text())["files"].keys() == {file.name for file in there.iterdir()} - {LIST}
    assert invoke(["verify", str(there)]) == 0
    assert not [file for file in cache.rglob("model*.safetensors")]  # no weights of base, model or output came to stay
    sizes = {file.stat().st_size for model in (sharded, tuned) for file in model.glob("*.safetensors")}
    assert not sizes & {file.stat().st_size for file in (cache / "objects").rglob("*") if file.is_file()}


def test_urls_that_only_this_process_sees(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    one = make_adapter(tiny_base, 1)
    for name, path in (("base", tiny_base), ("one", one)):
        for file in path.iterdir():
            memory.pipe_file(f"/merging/{name}/{file.name}", file.read_bytes())
    common: dict[str, Any] = {"method": "task_arithmetic", "parameters": {}, "weights": None}
    merge([str(one)], base=str(tiny_base), out=tmp_path / "here", **common)
    merge(["memory://merging/one"], base="memory://merging/base", out=tmp_path / "there", threads=4, **common)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


# Only what is needed


def job_of(names: list[str], base: str, **more: Any) -> Job:
    opened = open_inputs(names, base)
    settings = Settings.read(native("linear", "mergekit"), names, {}, None).over(opened.base.entries)
    return Job(opened, "linear", settings, "mergekit", 0, None, "full", more.get("elements", 1 << 18), 1)


def test_a_worker_reads_only_its_file(sharded: Path, tuned: Path, tmp_path: Path, reads: Reads,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = job_of([tuned.as_uri()], sharded.as_uri(), elements=64)  # many tiles
    file = job.inputs.base.files[1]
    room = tmp_path / "room" / "out"
    room.mkdir(parents=True)
    reads.clear()
    spread._write(job, room, file.name)
    assert {name for name, _, _ in reads} == {file.name}
    size = file.stat().st_size
    tensors = [entry for entry in job.inputs.base.entries.values() if entry.file == file]
    assert sum(stop - start for _, start, stop in reads) <= 2 * size + 2 * size  # weights of both, and headers
    assert any(entry.rows > 2 * tile_rows(entry.columns, 64) for entry in tensors)
    assert len(reads) <= 2 * len(tensors) + 4  # a tensor is a request, not a tile or a row
    assert (room / file.name).stat().st_size == size


def test_a_delta_reads_what_it_changes(sharded: Path, make_adapter: AdapterFactory, tmp_path: Path, reads: Reads) -> None:
    one = make_adapter(sharded, 1, target_modules=["v_proj"])
    base = Checkpoint.open(fetched(sharded.as_uri(), MODEL_FILES, weights=False))
    content_hash(base.path)
    reads.clear()
    line = ["delta", str(one), "--base", sharded.as_uri(), "-q", "-o", str(tmp_path / "out")]
    assert invoke(line) == 0
    for name, start, stop in reads:
        inside = [entry for entry in base.entries.values() if entry.file.name == name
                  and start < entry.offset + entry.nbytes and stop > entry.offset]
        assert start == 0 or all("v_proj" in entry.name for entry in inside)  # or a header
    assert any(start for _, start, _ in reads)


def test_content_is_hashed_once(sharded: Path, reads: Reads) -> None:
    path = fetched(sharded.as_uri(), MODEL_FILES, weights=False)
    assert content_hash(path) == content_hash(sharded)
    assert sum(stop - start for _, start, stop in reads) >= sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    reads.clear()
    assert content_hash(path) == content_hash(sharded) and not reads


def test_what_the_cache_has_is_read_there(sharded: Path, reads: Reads) -> None:
    fetched(sharded.as_uri(), MODEL_FILES)
    opened = Checkpoint.open(fetched(sharded.as_uri(), MODEL_FILES, weights=False))
    for name, entry in opened.entries.items():
        assert opened.raw(name) == Checkpoint.open(sharded).raw(name) and entry.file != Path(str(entry.file))
    assert not reads


def test_only_the_cache_says_where_weights_are(tmp_path: Path, tiny_base: Path) -> None:
    model = tmp_path / "fetched" / "0123456789abcdef" / "model"
    shutil.copytree(tiny_base, model)
    (model.parent / ".weights.json").write_text('{"url": "file:///elsewhere", "files": {"model.safetensors": [1, "x"]}}')
    assert weight_files(model) == {}
    assert Checkpoint.open(model).files == (model / "model.safetensors",)


@pytest.mark.parametrize("given", ["s3://bucket/runs/sft", "s3://bucket/runs/sft/"])
def test_a_url_is_called_by_its_last_part(given: str, tmp_path: Path) -> None:
    assert label(given, tmp_path) == "sft"
