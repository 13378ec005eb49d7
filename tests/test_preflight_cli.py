"""Before any work every command that needs a model or writes one asks whether disk and memory can suffice: exit 5 if not."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory

from paft import preflight
from paft.cli import invoke

USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def commands(world: World) -> dict[str, list[str]]:
    data = ["--sft-data", str(world.chat), "--pref-data", str(world.pairs)]
    out = ["-o", str(world.out)]
    model = [*out, "-m", str(world.base), "--set", "trainer.max_steps=2"]
    return {
        "delta": ["delta", str(world.one), *out],
        "delta to lora": ["delta", str(world.one), "--to-lora", *out],
        "delta of a rank": ["delta", str(world.one), "--to-lora", "--rank", "2", *out],
        "merge": world.merge(),
        "merge to lora": world.merge("--method", "linear", "--output-kind", "lora"),
        "merge to delta": world.merge("--method", "linear", "--output-kind", "delta"),
        "eval": ["eval", str(world.one), *data],
        "eval a model": ["eval", str(world.base), "--sft-data", str(world.chat)],
        "search": ["search", str(world.one), str(world.two), *data, "--trials", "2", *out],
        "train-sft": world.train(),
        "train-dpo": ["train-dpo", "-d", str(world.pairs), *model],
        "train-joint": ["train-joint", *data, *model],
    }


WRITE = ("delta", "delta to lora", "delta of a rank", "merge", "merge to lora", "merge to delta")


@pytest.mark.parametrize("name", [*WRITE, "eval", "eval a model", "search", "train-sft", "train-dpo", "train-joint"])
def test_too_little_memory_is_told_before_any_work(name: str, world: World, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: Capture) -> None:
    before = sorted(world.folder.rglob("*"))
    monkeypatch.setattr(preflight, "free_memory", lambda: 100)
    assert_one_error(capsys, invoke([*commands(world)[name], "-q"]), 5, "of memory, and 0.0 MB are free")
    assert sorted(world.folder.rglob("*")) == before


@pytest.mark.parametrize("name", [*WRITE, "train-sft"])
def test_too_small_a_disk_is_told_before_any_work(name: str, world: World, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: Capture) -> None:
    before = sorted(world.folder.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: USAGE(1000, 900, 100))
    assert_one_error(capsys, invoke([*commands(world)[name], "-q"]), 5, "of disk, and 0.0 MB are free")
    assert sorted(world.folder.rglob("*")) == before


@pytest.mark.parametrize("name", WRITE)
def test_the_disk_is_asked_for_no_more_than_is_written(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    real = preflight.check_disk
    for module in ("outputs", "estimate"):
        monkeypatch.setattr(f"paft.merge.{module}.check_disk", lambda out, size: (asked.append(size), real(out, size)))
    assert invoke([*commands(world)[name], "-q", *(["--no-check"] if name.startswith("merge") else [])]) == 0
    written = sum(file.stat().st_size for file in world.out.glob("*.safetensors"))
    assert 0.5 * written < max(asked) <= written
