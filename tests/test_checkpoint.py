"""Headers and slices of safetensors, against the library; damaged and unsafe directories are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paft.checkpoint import INDEX, SINGLE, Checkpoint
from paft.errors import MismatchError, NotFoundError, PaftError

TENSORS = {
    "matrix": torch.arange(30.0).view(10, 3),
    "half": torch.arange(8.0).view(4, 2).bfloat16(),
    "stack": torch.arange(24.0).view(2, 3, 4),
    "vector": torch.arange(5.0),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
    "count": torch.tensor([3]),
}


def save(path: Path, tensors: dict[str, torch.Tensor], file: str = SINGLE) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / file, metadata={"format": "pt"})
    return path


def test_tiles_are_the_rows_of_the_folded_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, TENSORS))
    assert checkpoint.entries.keys() == TENSORS.keys()
    for name, entry in checkpoint.entries.items():
        if not entry.is_float:
            continue
        whole = TENSORS[name].reshape(entry.rows, entry.columns)
        for step in (1, 2, 100):
            tiles = [checkpoint.tile(name, a, min(a + step, entry.rows)) for a in range(0, entry.rows, step)]
            assert torch.equal(torch.cat(tiles) if tiles else whole, whole)
    assert checkpoint.raw("count") == b"\x03" + bytes(7)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3, 3), "b": torch.ones(2)})
    whole = (tmp_path / SINGLE).read_bytes()
    for length in [0, 4, 8, 20, len(whole) - 9, len(whole) - 1]:
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(MismatchError, match="safetensors"):
            Checkpoint.open(tmp_path)
    (tmp_path / SINGLE).write_bytes(whole + b"x")
    with pytest.raises(MismatchError, match="complete"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}},
        {"a": {"dtype": None, "shape": [2], "data_offsets": [0, 8]}},
        {"a": 3},
        [],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(MismatchError):
        Checkpoint.open(tmp_path)


def index(path: Path, weight_map: object) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_header_without_end_is_refused(tmp_path: Path) -> None:
    text = b"[" * 100_000 + b"]" * 100_000
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(MismatchError, match="complete"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"a": "../outside.safetensors"}, MismatchError, "outside its directory"),
        ({"a": "/etc/passwd"}, MismatchError, "outside its directory"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, NotFoundError, "missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, MismatchError, "does not hold"),
        ({}, MismatchError, "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: object, error: type[PaftError], message: str) -> None:
    save(tmp_path, {"a": torch.ones(2)}, "one.safetensors")
    save(tmp_path.parent, {"a": torch.ones(2)}, "outside.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(error, match=message):
        Checkpoint.open(tmp_path)


def test_other_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(NotFoundError, match="holds no"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(MismatchError, match="pickle"):
        Checkpoint.open(tmp_path)
    save(tmp_path, {"a": torch.ones(2)}, "one.safetensors")
    save(tmp_path, {"a": torch.ones(2), "b": torch.ones(1)}, "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(MismatchError, match="twice"):
        Checkpoint.open(tmp_path)
