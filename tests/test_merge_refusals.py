"""Bad input to a merge: one error of the right kind that names the cause, and the target directory as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file

from paft.adapter import CONFIG, WEIGHTS
from paft.checkpoint import SINGLE
from paft.errors import MismatchError, NotFoundError, PaftError, UsageError
from paft.merge.engine import merge


def run(inputs: list[Path], out: Path, method: str = "task_arithmetic", **options: Any) -> dict[str, Any]:
    options = {"base": None, "parameters": {}, "weights": None, **options}
    return merge([str(path) for path in inputs], method=method, out=out, **options)


@pytest.fixture
def pair(tiny_base: Path, make_adapter: AdapterFactory) -> list[Path]:
    return [make_adapter(tiny_base, seed) for seed in (1, 2)]


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nan(adapter: Path, base: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, adapter / WEIGHTS)


def truncated_base(adapter: Path, base: Path) -> None:
    (base / SINGLE).write_bytes((base / SINGLE).read_bytes()[:-8])


def wrong_base(adapter: Path, base: Path) -> None:
    tensors = load_file(base / SINGLE)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, base / SINGLE)


def base_is_gone(adapter: Path, base: Path) -> None:
    shutil.rmtree(base)


def other_base(adapter: Path, base: Path) -> None:
    edited(adapter / CONFIG, base_model_name_or_path="org/other")


def damaged_values(adapter: Path, base: Path) -> None:
    """Only seen in the middle of the writing."""
    tensors = load_file(base / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, base / SINGLE)


def large_norm(adapter: Path, base: Path) -> None:
    """Finite in float32, in a tensor that no adapter touches."""
    tensors = load_file(base / SINGLE)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / SINGLE)


NOTHING = lambda adapter, base: None  # noqa: E731

BAD: dict[str, tuple[Callable[[Path, Path], None], dict[str, Any], type[PaftError], str]] = {
    "nan": (nan, {}, MismatchError, "NaN"),
    "dora": (lambda a, b: edited(a / CONFIG, use_dora=True), {}, MismatchError, "use_dora"),
    "truncated": (truncated_base, {}, MismatchError, "complete safetensors"),
    "wrong-base": (wrong_base, {}, MismatchError, r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
    "no-base": (base_is_gone, {}, NotFoundError, "the base that the adapters name"),
    "two-bases": (other_base, {}, MismatchError, "different bases"),
    "base-inf": (damaged_values, {}, MismatchError, r"the base's model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"),
    "overflow": (NOTHING, {"dtype": "float16", "parameters": {"lambda": 1e7}}, MismatchError, "does not fit into float16"),
    "untouched": (large_norm, {"dtype": "float16"}, MismatchError, r"the base's model\.norm\.weight does not fit into float16"),
    "method": (NOTHING, {"method": "tise"}, UsageError, "no merge method"),
    "parameter": (NOTHING, {"parameters": {"densty": 0.5}}, UsageError, "no parameter 'densty'"),
    "density": (NOTHING, {"parameters": {"density": 2.0}}, UsageError, "density must be"),
    "densities": (NOTHING, {"parameters": {"density": [0.5]}}, UsageError, "1 values for 2"),
    "weights": (NOTHING, {"weights": [1.0]}, UsageError, "1 weights for 2"),
    "weight-nan": (NOTHING, {"weights": [1.0, float("nan")]}, UsageError, "finite"),
    "weight-twice": (NOTHING, {"weights": [1.0, 1.0], "parameters": {"weight": 1.0}}, UsageError, "twice"),
    "dialect": (NOTHING, {"dialect": "peff"}, UsageError, "no dialect"),
    "dtype": (NOTHING, {"dtype": "bfloat"}, UsageError, "no dtype"),
    "kind": (NOTHING, {"output_kind": "ful"}, UsageError, "no output kind"),
    "lora": (NOTHING, {"output_kind": "lora"}, UsageError, "not of low rank"),
    "absent": (NOTHING, {"base": "/nowhere/at/all"}, NotFoundError, "nowhere"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, case: str, overwrite: bool) -> None:
    harm, options, error, message = BAD[case]
    base = shutil.copytree(tiny_base, tmp_path / "base")
    adapters = [make_adapter(tiny_base, seed) for seed in (1, 2)]
    for adapter in adapters:
        edited(adapter / CONFIG, base_model_name_or_path=str(base))
    harm(adapters[0], base)
    out = tmp_path / "room" / "out"
    out.mkdir(parents=True)
    if overwrite:
        (out / "old.txt").write_text("old")
    options = {"method": "ties", **options}
    with pytest.raises(error, match=message):
        run(adapters, out, overwrite=overwrite, **options)
    assert [file.name for file in out.iterdir()] == (["old.txt"] if overwrite else [])
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_a_target_that_is_not_empty_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(MismatchError, match="not empty"):
        run([tmp_path / "no-such-adapter"], tmp_path / "out")


def test_a_target_that_holds_an_input_is_refused(tiny_base: Path, pair: list[Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    with pytest.raises(MismatchError, match="holds an input"):
        run(pair, base, base=str(base), overwrite=True)


def test_a_model_without_a_base_is_no_delta(tiny_base: Path, pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs its base"):
        run([tiny_base], tmp_path / "out")
    with pytest.raises(MismatchError, match="is an adapter"):
        run(pair, tmp_path / "out", base=str(pair[0]))
    with pytest.raises(MismatchError, match="every input is the base itself"):
        run([tiny_base], tmp_path / "out", base=str(tiny_base))
    with pytest.raises(UsageError, match="nothing to merge"):
        run([], tmp_path / "out")
    with pytest.raises(NotFoundError, match="neither an adapter nor a model"):
        run([tmp_path], tmp_path / "out")
