"""Outputs are complete or absent, and a hash tells one flipped byte but not a re-sharding."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError
from paft.provenance import check_target, content_hash, output_dir, read_manifest, verify, write_manifest

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.linspace(-1, 1, 10).to(torch.bfloat16),
    "c": torch.ones(2, 3, dtype=torch.int64),
    "d": torch.zeros(0, 4),
}


def tree(path: Path) -> dict[str, bytes]:
    """Every file below ``path``, hidden ones too, with its content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# output_dir


def test_a_finished_block_leaves_the_target_and_nothing_else(tmp_path: Path) -> None:
    with output_dir(tmp_path / "deep" / "out") as directory:
        assert not (tmp_path / "deep" / "out").exists()
        (directory / "file").write_text("x")
    assert tree(tmp_path) == {"deep/out/file": b"x"}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), output_dir(tmp_path / "out") as directory:
        (directory / "file").write_text("x")
        raise error
    assert tree(tmp_path) == {} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [{}, {"old": "1"}])
def test_a_killed_process_leaves_the_target_as_it_was(before: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name, text in before.items():
        target.mkdir(exist_ok=True)
        (target / name).write_text(text)
    script = """
import os, signal, sys
from pathlib import Path
from paft.provenance import output_dir
with output_dir(Path(sys.argv[1]), overwrite=True) as directory:
    (directory / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(target)])
    assert done.returncode == -signal.SIGKILL
    assert target.exists() == bool(before)
    assert not before or tree(target) == {"old": b"1"}
    with output_dir(target, overwrite=True) as directory:  # what is left behind does not hinder the next run
        (directory / "new").write_text("y")
    assert tree(target) == {"new": b"y"}


def test_overwrite_keeps_the_old_until_the_new_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(RuntimeError), output_dir(target, overwrite=True) as directory:
        (directory / "new").write_text("2")
        assert tree(target) == {"old": b"1"}
        raise RuntimeError
    assert tree(tmp_path) == {"out/old": b"1"}
    with output_dir(target, overwrite=True) as directory:
        (directory / "new").write_text("2")
    assert tree(tmp_path) == {"out/new": b"2"}


def test_a_target_that_is_not_empty_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    worked = []
    for name in ("full", "file"):
        with pytest.raises(MismatchError) as caught, output_dir(tmp_path / name):
            worked.append(name)
        assert caught.value.exit_code == 3
    with pytest.raises(MismatchError, match="file"):
        check_target(tmp_path / "file", overwrite=True)
    assert not worked and tree(tmp_path) == before
    with output_dir(tmp_path / "empty") as directory:
        (directory / "file").write_text("x")
    assert tree(tmp_path / "empty") == {"file": b"x"}


def test_the_current_directory_and_its_parents_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for target in (Path("."), Path(".."), tmp_path / "a", inside, Path("../b")):
        with pytest.raises(MismatchError, match="current directory"):
            check_target(target, overwrite=True)


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for overwrite in (False, True):
        with pytest.raises(MismatchError):
            check_target(tmp_path / "link", overwrite=overwrite)


def test_what_a_link_leads_to_is_replaced_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    for text in ("1", "2"):
        with output_dir(tmp_path / "link", overwrite=True) as directory:
            assert directory.parents[1] == tmp_path / "disk"
            (directory / "file").write_text(text)
        assert tree(tmp_path / "disk") == {"deep/file": text.encode()}
        assert (tmp_path / "link").is_symlink()


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    for overwrite in (False, True):
        with pytest.raises(MismatchError, match="mount point"), output_dir(tmp_path / "volume", overwrite=overwrite):
            raise AssertionError("worked")
    check_target(tmp_path / "volume", in_place=True)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_a_target_that_cannot_be_moved_leaves_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).name == "out":
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="busy"), output_dir(tmp_path / "out") as directory:
        (directory / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("code", "said"), [("ENOSPC", "disk full"), ("EDQUOT", "quota"), ("EFBIG", "file size limit")])
def test_no_room_is_the_environments_fault(code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=said), output_dir(tmp_path / "out"):
        raise OSError(getattr(errno, code), "as pwrite says it, without a file's name")
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_dots_is_a_name_all_the_same(tmp_path: Path) -> None:
    with output_dir(tmp_path / "x" / ".." / "out" / ".") as directory:
        (directory / "file").write_text("x")
    assert tree(tmp_path) == {"out/file": b"x"}


# content_hash


def independent_hash(tensors: dict[str, torch.Tensor]) -> str:
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        raw = bytes(tensor.view(torch.uint8).flatten().tolist()) if tensor.numel() else b""
        digest.update(f"{name}\0{kinds[tensor.dtype]}\0{list(tensor.shape)}\0{hashlib.sha256(raw).hexdigest()}\0".encode())
    return digest.hexdigest()


@pytest.mark.parametrize("shards", [[["a", "b", "c", "d"]], [["d", "c"], ["b", "a"]], [["c"], ["a"], ["d"], ["b"]]])
def test_content_hash_is_that_of_the_tensors_alone(shards: list[list[str]], tmp_path: Path) -> None:
    for number, names in enumerate(shards):
        save_file({name: TENSORS[name] for name in names}, tmp_path / f"part-{number}.safetensors", metadata={"n": str(number)})
    (tmp_path / "config.json").write_text("{}")
    assert content_hash(tmp_path) == independent_hash(TENSORS)


def write_by_hand(file: Path, order: list[str]) -> None:
    """A safetensors file whose header and data stand in ``order`` (the library sorts by dtype)."""
    header, data = {}, b""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name in order:
        tensor = TENSORS[name]
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) if tensor.numel() else b""
        span = [len(data), len(data) + len(raw)]
        header[name] = {"shape": list(tensor.shape), "data_offsets": span, "dtype": kinds[tensor.dtype]}
        data += raw
    text = json.dumps(header, indent=2).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_content_hash_ignores_the_order_of_the_header(tmp_path: Path) -> None:
    for order in (list("abcd"), list("dcba"), list("bdac")):
        write_by_hand(tmp_path / "model.safetensors", order)
        assert content_hash(tmp_path) == independent_hash(TENSORS)


def test_content_hash_tells_names_types_and_shapes_apart(tmp_path: Path) -> None:
    base = TENSORS["a"]
    variants = [{"a": base}, {"b": base}, {"a": base.reshape(4, 3)}, {"a": base.view(torch.int32)},
                {"a": base, "d": TENSORS["d"]}]
    hashes = set()
    for number, tensors in enumerate(variants):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        hashes.add(content_hash(folder))
    assert len(hashes) == len(variants)


# verify


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    write_manifest(tmp_path, command="test", recipe={"l1": 1e-3}, seed=7, wall_s=0.5)
    return tmp_path


def test_the_manifest_says_how_it_was_made(artefact: Path) -> None:
    manifest = read_manifest(artefact)
    assert manifest is not None
    assert (manifest["schema"], manifest["command"], manifest["recipe"], manifest["seed"]) == (1, "test", {"l1": 1e-3}, 7)
    assert manifest["content_sha256"] == independent_hash(TENSORS) and manifest["wall_s"] == 0.5
    assert {"python", "paft", "torch", "transformers", "trl", "peft"} <= manifest["versions"].keys()
    assert 10 < manifest["peak_memory_mb"] < 1e5
    assert verify(artefact) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(st.data())
def test_verify_finds_any_flipped_bit(artefact: Path, data: st.DataObject) -> None:
    file = artefact / "model.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(flipped)
    try:
        found = verify(artefact)
    except MismatchError as error:
        assert "safetensors" in error.message and place < start
    else:
        assert found or (8 <= place < start and whole[place : place + 1] == b" "), place  # the header's padding is no content
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -200, -1])
def test_a_cut_file_is_refused(keep: int, artefact: Path) -> None:
    file = artefact / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(MismatchError, match="not a complete safetensors file"):
        verify(artefact)


def test_a_lost_tensor_is_found(artefact: Path) -> None:
    save_file({name: TENSORS[name] for name in "abc"}, artefact / "model.safetensors")
    assert verify(artefact) == ["tensor d is missing"]
    (artefact / "model.safetensors").unlink()
    assert sorted(verify(artefact)) == [f"tensor {name} is missing" for name in "abcd"]


@pytest.mark.parametrize("text", ["{", "[]", "3", "\x00"])
def test_a_broken_manifest_is_refused(text: str, artefact: Path) -> None:
    (artefact / "paft.json").write_text(text)
    with pytest.raises(MismatchError, match="not a JSON object"):
        verify(artefact)


def test_somebody_elses_artefact_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    with pytest.raises(NotFoundError) as caught:
        verify(tmp_path)
    assert isinstance(caught.value, PaftError) and caught.value.exit_code == 4
