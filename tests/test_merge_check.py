"""A merged model that does not work is not put in place; and what cannot fit is refused before the work."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file

from paft import preflight
from paft.cli import invoke
from paft.errors import ResourceError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def spoiled(world: World, value: float, key: str = "model.norm.weight") -> Path:
    """The base with one entry replaced, in a tensor that no adapter touches."""
    path = world.folder / "spoiled"
    shutil.copytree(world.base, path)
    tensors = load_file(path / "model.safetensors")
    tensors[key][0] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_small_merge_is_checked_unasked(world: World, capsys: Capture) -> None:
    assert invoke(world.merge("--json")) == 0
    assert json.loads(capsys.readouterr().out)["check"] == {"loads": True, "finite_logits": True}
    assert invoke(world.merge("--json", "--overwrite", "--no-check")) == 0
    assert json.loads(capsys.readouterr().out)["check"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_with_a_weight_that_is_no_number_names_it(value: float, world: World, capsys: Capture) -> None:
    base = spoiled(world, value)
    before = sorted(world.folder.iterdir())
    code = invoke(world.merge("--base", str(base)))
    nan = value != value  # found as it is copied; infinity may be meant, in a mask
    said = "the base's model.norm.weight holds NaN" if nan else "model.norm.weight of the merged model holds NaN or infinity"
    assert_one_error(capsys, code, 3, said)
    assert sorted(world.folder.iterdir()) == before
    assert invoke(world.merge("--base", str(base), "--no-check")) == (3 if nan else 0)


def test_finite_weights_with_logits_that_are_not(world: World, capsys: Capture) -> None:
    base = spoiled(world, 3e38)  # finite, and its products are not
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][:] = 1e3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert_one_error(capsys, invoke(world.merge("--base", str(base))), 3, "its logits are not")


def test_a_model_that_transformers_cannot_load_is_a_note_unless_a_check_was_asked_for(world: World, capsys: Capture) -> None:
    base = world.folder / "odd"
    shutil.copytree(world.base, base)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "nobodys"}
    (base / "config.json").write_text(json.dumps(config))
    assert_one_error(capsys, invoke(world.merge("--base", str(base), "--check")), 3, "does not load")
    assert not world.out.exists()
    assert invoke(world.merge("--base", str(base))) == 0
    assert "note: not checked" in capsys.readouterr().err


# Pre-flight


def test_a_disk_without_room_is_refused_before_any_work(world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**6, 10**6, 1000))
    before = sorted(world.folder.rglob("*"))
    assert_one_error(capsys, invoke(world.merge()), 5, "of disk")
    assert_one_error(capsys, invoke(world.train()), 5, "of disk")
    assert sorted(world.folder.rglob("*")) == before


def test_a_machine_without_memory_is_refused_before_any_work(world: World, capsys: Capture,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_available", lambda: 1000)
    before = sorted(world.folder.rglob("*"))
    assert_one_error(capsys, invoke(world.merge()), 5, "of memory")
    assert_one_error(capsys, invoke(world.train()), 5, "of memory")
    assert sorted(world.folder.rglob("*")) == before


def test_free_memory_is_the_least_of_machine_container_and_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight, "_CGROUP", tmp_path)
    assert (preflight.free_memory() or 0) > 10**6
    stat = "anon 1\ninactive_file 500000\n"
    for name, text in (("memory.max", "5000000"), ("memory.current", "4000000"), ("memory.stat", stat)):
        (tmp_path / name).write_text(text)
    assert preflight.free_memory() == 1_500_000
    (tmp_path / "memory.max").write_text("max")
    assert (preflight.free_memory() or 0) > 5 * 10**6
    with pytest.raises(ResourceError, match="needs about"):
        preflight.check_memory("it", 1e18, "no")
    with pytest.raises(ResourceError, match="of disk"):
        preflight.check_disk(tmp_path / "not" / "yet", 1e18)
