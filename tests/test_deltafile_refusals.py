"""Delta files that are damaged or lie over another base: one error that names the tensor, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file

from paft.checkpoint import SINGLE, Checkpoint
from paft.errors import MismatchError, NotFoundError, PaftError
from paft.merge import deltafile
from paft.merge.deltafile import CONFIG, INDEX, DeltaFile
from paft.merge.engine import merge
from paft.merge.extract import Prune, extract

Q = "model.layers.0.self_attn.q_proj.weight"


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    def harm(delta: Path, base: Path) -> None:
        config = json.loads((delta / CONFIG).read_text())
        change(config)
        (delta / CONFIG).write_text(json.dumps(config))

    return harm


def edit_arrays(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], None]:
    def harm(delta: Path, base: Path) -> None:
        arrays = load_file(delta / deltafile.SINGLE)
        change(arrays)
        save_file(arrays, delta / deltafile.SINGLE)

    return harm


def edit_base(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], None]:
    def harm(delta: Path, base: Path) -> None:
        tensors = load_file(base / SINGLE)
        change(tensors)
        save_file(tensors, base / SINGLE)

    return harm


def cut(delta: Path, base: Path) -> None:
    file = delta / deltafile.SINGLE
    file.write_bytes(file.read_bytes()[:-10])


def escape(delta: Path, base: Path) -> None:
    (delta / INDEX).write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))


def twice(delta: Path, base: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(delta / deltafile.SINGLE, delta / f"{name}.safetensors")
    (delta / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))


BAD: dict[str, tuple[Callable[[Path, Path], None], type[PaftError], str]] = {
    "cut": (cut, MismatchError, "not a complete safetensors file"),
    "no-file": (lambda d, b: (d / deltafile.SINGLE).unlink(), NotFoundError, "holds no delta.safetensors"),
    "escape": (escape, MismatchError, "points outside"),
    "twice": (twice, MismatchError, "twice"),
    "schema": (edit(lambda c: c.update(schema=9)), MismatchError, "schema 9"),
    "empty": (edit(lambda c: c.update(tensors={})), MismatchError, "is empty"),
    "form": (edit(lambda c: c["tensors"][Q].update(format="zip")), MismatchError, f"record of {Q} is malformed"),
    "shape": (edit(lambda c: c["tensors"][Q].update(shape=[32, -1])), MismatchError, f"record of {Q} is malformed"),
    "leftover": (edit(lambda c: c["tensors"].pop(Q)), MismatchError, f"array {Q}#"),
    "nan": (edit_arrays(lambda a: a[Q + "#values"].fill_(float("nan"))), MismatchError, f"{Q}#values holds NaN"),
    "missing": (edit_arrays(lambda a: a.pop(Q + "#values")), MismatchError, f"array {Q}#(rows|values)"),
    "short": (edit_arrays(lambda a: a.update({Q + "#values": torch.ones(3)})), MismatchError, f"{Q}"),
    "rows": (edit_arrays(lambda a: a[Q + "#rows"][5:7].add_(40)), MismatchError, f"{Q}#rows does not count"),
    "places": (edit_arrays(lambda a: a[Q + "#mask"][3].fill_(0)), MismatchError, f"places of {Q} do not fit"),
    "base-values": (edit_base(lambda t: t[Q].add_(1)), MismatchError, f"{Q} of this base is not the tensor"),
    "base-shape": (edit_base(lambda t: t.update({Q: torch.ones(4, 4)})), MismatchError, rf"ΔW of {Q} is \[32, 32\]"),
    "base-lacks": (edit_base(lambda t: t.pop(Q)), MismatchError, f"the base has no tensor {Q}"),
    "base-int": (edit_base(lambda t: t.update({Q: t[Q].to(torch.int8)})), MismatchError, f"{Q} is quantised"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case: str, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    harm, error, message = BAD[case]
    base = shutil.copytree(tiny_base, tmp_path / "base")
    extract(str(make_adapter(tiny_base, 1)), base=str(base), out=tmp_path / "delta", prune=Prune(largest=0.3))
    harm(tmp_path / "delta", base)
    with pytest.raises(error, match=message):
        merge([str(tmp_path / "delta")], base=None, method="linear", parameters={}, weights=None, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def test_a_wider_copy_of_the_base_will_do(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    narrow, wide = (shutil.copytree(tiny_base, tmp_path / name) for name in ("narrow", "wide"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tiny_base / SINGLE).items()}
    save_file(tensors, narrow / SINGLE)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, wide / SINGLE)
    extract(str(make_adapter(tiny_base, 1)), base=str(narrow), out=tmp_path / "delta")
    assert DeltaFile(tmp_path / "delta", Checkpoint.open(wide)).tensor(Q).rows == 32
    with pytest.raises(MismatchError, match="is not the tensor that the delta was made on"):
        DeltaFile(tmp_path / "delta", Checkpoint.open(tiny_base))
