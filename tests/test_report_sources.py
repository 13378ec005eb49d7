"""What can be reported on: adapters with and without base, models, delta files; and what is refused, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clikit import Capture, assert_one_error
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file
from test_report_sparsity import flat
from trainkit import pref_rows, sft_rows

from paft.cli import invoke
from paft.errors import MismatchError, NotFoundError, UsageError
from paft.merge import extract
from paft.merge.engine import merge
from paft.recipe import DpoRecipe, SftRecipe
from paft.report.norms import norms
from paft.report.sources import open_source
from paft.report.sparsity import SparsityReport, sparsity
from paft.train.stage import train


def report(path: Path, base: Path | None = None) -> SparsityReport:
    return sparsity(open_source(str(path), str(base) if base else None))


@pytest.fixture
def adapter(tiny_base: Path, make_adapter: AdapterFactory) -> Path:
    return make_adapter(tiny_base, 1)


def test_with_its_base_an_adapter_has_the_same_measures_and_more(tiny_base: Path, adapter: Path) -> None:
    alone, beside = report(adapter), report(adapter, tiny_base)
    assert {tensor.name for tensor in alone.tensors} == {tensor.name for tensor in beside.tensors}
    found = {tensor.name: tensor for tensor in beside.tensors}
    for tensor in alone.tensors:
        extra = {"relative_norm", "invisible", "energy_visible"}
        other = {key: value for key, value in flat(found[tensor.name].moments).items() if key not in extra}
        assert flat(tensor.moments) == other
    assert alone.overall.moments.relative is None and beside.overall.moments.relative is not None
    assert alone.verdict == beside.verdict


def test_a_model_and_a_delta_file_show_what_the_adapter_does(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    merge([str(adapter)], base=str(tiny_base), method="linear", parameters={}, weights=None, out=tmp_path / "model")
    extract.extract(str(adapter), base=str(tiny_base), out=tmp_path / "delta")
    wanted = {tensor.name: tensor.moments for tensor in report(adapter).tensors}
    delta = report(tmp_path / "delta", tiny_base)
    assert {tensor.name for tensor in delta.tensors} == wanted.keys()
    for tensor in delta.tensors:
        assert tensor.moments.frobenius == pytest.approx(wanted[tensor.name].frobenius, rel=1e-6)
        assert tensor.spectrum and tensor.spectrum.rank == 4
    model = report(tmp_path / "model", tiny_base)
    kinds = {group.label: group.moments for group in model.kinds}
    assert kinds["lm_head"].zeros == kinds["lm_head"].entries
    for tensor in model.tensors:
        if tensor.name not in wanted:
            assert tensor.moments.max == 0
            continue
        assert tensor.moments.n_eff == pytest.approx(wanted[tensor.name].n_eff, rel=1e-3)
        assert tensor.spectrum
        assert sum(value > 1e-4 * tensor.spectrum.spectral for value in tensor.spectrum.values) == 4


def test_a_dense_update_that_bfloat16_rounds_away_is_small_and_not_sparse(tmp_path: Path, tiny_base: Path) -> None:
    """The same dense update at four learning rates, stored in bfloat16: zeros come and go, it is never called sparse."""
    base, words, zeros = tmp_path / "base", [], []
    shutil.copytree(tiny_base, base)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tiny_base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for rate in (1e-6, 1e-5, 1e-4, 1e-2):
        generator = torch.Generator().manual_seed(0)
        tuned = {name: (tensor.float() + rate * torch.randn(tensor.shape, generator=generator)).bfloat16()
                 for name, tensor in weights.items()}
        path = tmp_path / str(rate)
        shutil.copytree(base, path)
        save_file(tuned, path / "model.safetensors", {"format": "pt"})
        found = report(path, base)
        words.append(found.verdict.word)
        zeros.append(found.overall.moments.zeros / found.overall.moments.entries)
    assert zeros[0] > 0.9 > 0.5 > zeros[2] > zeros[3] and zeros == sorted(zeros, reverse=True)
    assert words == ["small", "small", "dense", "dense"]


def test_a_base_that_was_only_rounded_is_small(tmp_path: Path, tiny_base: Path) -> None:
    """Nothing was trained: the float32 base, stored in bfloat16, differs from itself by rounding alone, in every entry."""
    shutil.copytree(tiny_base, tmp_path / "rounded")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tiny_base / "model.safetensors").items()}
    save_file(weights, tmp_path / "rounded" / "model.safetensors", {"format": "pt"})
    assert report(tmp_path / "rounded", tiny_base).verdict.word == "small"


def test_what_an_adapter_replaces_is_measured_with_its_base(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    path = make_adapter(tiny_base, 2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "lm_head" in key)
    save_file(tensors | {name: tensors[name] + 0.5}, file, {"format": "pt"})
    alone, beside = report(path), report(path, tiny_base)
    assert alone.note and "lm_head" in alone.note and beside.note is None
    head = next(tensor for tensor in beside.tensors if tensor.name == "lm_head")
    assert head.moments.rms == pytest.approx(0.5, rel=1e-5)


def test_fast_numbers_are_those_of_the_pass(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    quick, whole = norms(open_source(str(adapter))), report(adapter)
    assert quick.overall.frobenius == pytest.approx(whole.overall.moments.frobenius, rel=1e-10)
    for one, tensor in zip(quick.tensors, whole.tensors, strict=True):
        assert (one.label, one.rms) == (tensor.name, pytest.approx(tensor.moments.rms, rel=1e-10))
    merge([str(adapter)], base=str(tiny_base), method="linear", parameters={}, weights=None, out=tmp_path / "model")
    with pytest.raises(UsageError, match="no factors"):
        norms(open_source(str(tmp_path / "model"), str(tiny_base)))


def spoil(path: Path, **config: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def foreign(path: Path, kind: str) -> None:
    """Make one of the ways in which an adapter is none."""
    weights = path / "adapter_model.safetensors"
    {
        "ia3": lambda: spoil(path, peft_type="IA3"),
        "prompt": lambda: spoil(path, peft_type="PROMPT_TUNING"),
        "no config": lambda: (path / "adapter_config.json").unlink(),
        "broken config": lambda: (path / "adapter_config.json").write_text("{"),
        "no weights": weights.unlink,
        "cut": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "empty": lambda: save_file({}, weights),
        "nothing": lambda: weights.write_bytes(b""),
        "nan": lambda: save_file({k: t * np.nan for k, t in load_file(weights).items()}, weights, {"format": "pt"}),
        "stranger": lambda: save_file({"a": torch.ones(2, 2)}, weights, {"format": "pt"}),
        "half": lambda: save_file(dict(list(load_file(weights).items())[1:]), weights, {"format": "pt"}),
        "pickle": lambda: weights.rename(weights.with_suffix(".bin")),
        "list": lambda: (path / "adapter_config.json").write_text("[]"),
        "no number": lambda: spoil(path, r="sixteen"),
        "pointer": lambda: weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "integers": lambda: save_file({k: t.to(torch.int8) for k, t in load_file(weights).items()}, weights),
    }[kind]()


@pytest.mark.parametrize("kind, code", [
    ("ia3", 3), ("prompt", 3), ("no config", 4), ("broken config", 3), ("no weights", 4), ("cut", 3), ("empty", 3),
    ("nothing", 3), ("nan", 3), ("stranger", 3), ("half", 3), ("pickle", 3), ("list", 3), ("no number", 3),
    ("pointer", 3), ("integers", 3),
])  # fmt: skip
@pytest.mark.parametrize("command", [["sparsity-report"], ["sparsity-report", "--fast"], ["interference"]], ids=" ".join)
def test_what_is_no_lora_is_refused_in_one_line(adapter: Path, kind: str, code: int, command: list[str],
                                                capsys: Capture) -> None:
    foreign(adapter, kind)
    found = invoke([*command, *[str(adapter)] * (2 if command == ["interference"] else 1)])
    assert_one_error(capsys, found, code, adapter.name)


@pytest.mark.parametrize("spoilt", ["model", "base"])
def test_a_model_that_is_cut_short_is_refused_in_one_line(tiny_base: Path, tmp_path: Path, spoilt: str, capsys: Capture) -> None:
    for name in ("model", "base"):
        shutil.copytree(tiny_base, tmp_path / name)
    weights = tmp_path / spoilt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = invoke(["sparsity-report", str(tmp_path / "model"), "--base", str(tmp_path / "base")])
    assert_one_error(capsys, found, 3, str(weights))


def test_the_directory_above_a_checkpoint_points_at_it(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-100")
    with pytest.raises(NotFoundError) as caught:
        open_source(str(tmp_path / "run"))
    assert caught.value.hint and "checkpoint-100" in caught.value.hint


def test_a_model_needs_its_base_and_an_adapter_the_right_one(tiny_base: Path, adapter: Path) -> None:
    with pytest.raises(UsageError, match="base"):
        open_source(str(tiny_base))
    path = adapter / "adapter_model.safetensors"
    save_file({key: torch.cat([t, t]) if "lora_B" in key else t for key, t in load_file(path).items()}, path, {"format": "pt"})
    assert open_source(str(adapter)).parts
    with pytest.raises(MismatchError):
        open_source(str(adapter), str(tiny_base))


def test_what_the_files_tell_of_the_training(adapter: Path) -> None:
    """Hugging Face's trainer state or paft's own record; a broken one tells nothing and stops nothing."""
    assert open_source(str(adapter)).about.keys() >= {"rank", "alpha", "base"}
    history = [{"learning_rate": rate, "step": step} for step, rate in enumerate((0.0, 2e-4, 1e-4))]
    state = adapter / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 70, "log_history": [*history, {"eval_loss": 1.0}]}))
    about = open_source(str(adapter)).about
    assert (about["rank"], about["alpha"], about["learning_rate"], about["steps"]) == (4, 8, 2e-4, 70)
    (adapter / "paft.json").write_text(json.dumps({"recipe": {"trainer": {"learning_rate": 5e-7}}, "metrics": {"steps": 9.0}}))
    about = open_source(str(adapter)).about
    assert (about["learning_rate"], about["steps"]) == (5e-7, 9)
    state.write_text("{")
    assert open_source(str(adapter)).about["steps"] == 9
    for odd in ("[1]", '{"recipe": "x", "metrics": [], "resolved": null}'):
        (adapter / "paft.json").write_text(odd)
        assert open_source(str(adapter)).about.keys() == {"base", "rank", "alpha", "rslora"}


@pytest.mark.parametrize("kind, rows, rate", [(SftRecipe, sft_rows, 2e-4), (DpoRecipe, pref_rows, 5e-6)])
def test_a_learning_rate_left_to_its_default_is_told(tiny_base: Path, tmp_path: Path, kind: Any, rows: Any, rate: float) -> None:
    recipe = kind(model=str(tiny_base), trainer={"max_steps": 1})
    train(recipe, tmp_path / "a", rows={"train": rows(8), "eval": []}, quiet=True)
    assert open_source(str(tmp_path / "a")).about["learning_rate"] == rate
