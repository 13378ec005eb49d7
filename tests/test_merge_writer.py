"""How a model is written: by any number of threads, from any layout, with hashes taken on the way, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file

from paft.checkpoint import INDEX, SINGLE, Entry
from paft.cli import invoke
from paft.errors import ResourceError
from paft.merge import engine, writer
from paft.provenance import content_hash, read_manifest, verify


@pytest.fixture
def pair(tiny_base: Path, make_adapter: AdapterFactory) -> list[str]:
    return [str(make_adapter(tiny_base, seed)) for seed in (1, 2)]


def run(pair: list[str], out: Path, **options: Any) -> dict[str, Any]:
    settings = {"base": None, "method": "dare_ties", "parameters": {"density": 0.5}, "weights": None, **options}
    return engine.merge(pair, out=out, **settings)


def weight_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_threads_change_no_byte(pair: list[str], tmp_path: Path, threads: int, dtype: str | None) -> None:
    alone = run(pair, tmp_path / "one", threads=1, dtype=dtype)
    among = run(pair, tmp_path / "many", threads=threads, dtype=dtype)
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "many")
    assert {key: value for key, value in alone.items() if key not in ("wall_s", "out")} == {
        key: value for key, value in among.items() if key not in ("wall_s", "out")}


def test_the_shard_layout_changes_no_tensor(pair: list[str], tiny_base: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(tiny_base, tmp_path / "sharded")
    tensors = load_file(sharded / SINGLE)
    (sharded / SINGLE).unlink()
    names = sorted(tensors, reverse=True)
    where = {name: f"model-{index % 3 + 1:05d}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, sharded / file, metadata={"format": "pt"})
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    run(pair, tmp_path / "a", base=str(tiny_base))
    run(pair, tmp_path / "b", base=str(sharded))
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    assert sorted(weight_bytes(tmp_path / "b")) == sorted(set(where.values()))


def test_a_single_file_goes_before_an_older_index(pair: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """As transformers loads it. The output has neither the index nor what it names."""
    from transformers import AutoModelForCausalLM

    mixed = shutil.copytree(tiny_base, tmp_path / "mixed")
    old = {name: tensor + 1 for name, tensor in load_file(mixed / SINGLE).items()}
    save_file(old, mixed / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (mixed / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}))
    loaded = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32).state_dict()
    run(pair, tmp_path / "out", base=str(mixed), method="task_arithmetic", parameters={"lambda": 0.0})
    found = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(found[name], loaded[name]) for name in found)
    assert sorted(weight_bytes(tmp_path / "out")) == [SINGLE] and not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_hashes_taken_while_writing_are_those_of_the_files(pair: list[str], tiny_base: Path, tmp_path: Path,
                                                              dtype: str | None) -> None:
    run(pair, tmp_path / "out", dtype=dtype)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["content_sha256"] == content_hash(tmp_path / "out")
    assert manifest["base"]["content_sha256"] == content_hash(tiny_base)
    assert verify(tmp_path / "out") == []


def test_an_error_in_one_thread_ends_the_merge_with_that_error(pair: list[str], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def one(entry: Entry, *rest: Any) -> tuple[str, str]:
        seen.append(entry.name)
        if len(seen) == 3:
            raise ResourceError(f"{entry.name}: no")
        return "", ""

    monkeypatch.setattr(writer, "_write_one", one)
    before = torch.get_num_threads()
    with pytest.raises(ResourceError, match=": no"):
        run(pair, tmp_path / "out", threads=1)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(pair: list[str], small_disk: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    (small_disk / "filler").write_bytes(os.urandom(200_000))
    assert invoke(["merge", *pair, "--method", "ties", "-o", str(small_disk / "out"), "--quiet"]) == 5
    told = capsys.readouterr().err
    assert "disk" in told and "Traceback" not in told
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
