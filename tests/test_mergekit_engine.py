"""`--engine mergekit`: mergekit's methods on adapters that paft folded; all or nothing, and nothing left beside it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from clikit import Capture, assert_one_error
from conftest import AdapterFactory
from mergekitkit import Workshop, distance, tensors
from safetensors.torch import save_file

from paft.checkpoint import Checkpoint
from paft.cli import invoke
from paft.merge.mergekit import engine as backend


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, make_adapter: AdapterFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mergekit"), make_adapter)


@pytest.fixture
def room(workshop: Workshop) -> Any:
    """An empty folder for outputs, which must hold nothing but them afterwards."""
    folder = workshop.folder / "room"
    folder.mkdir()
    yield folder
    left = [path.name for path in folder.iterdir() if path.name != "out"]
    shutil.rmtree(folder)
    assert left == []


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit in this process, which saves five seconds of imports for each run."""

    def run(config: dict[str, Any], scratch: Path, seed: int) -> None:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        options = MergeOptions(quiet=True, random_seed=seed, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(config), str(scratch / "merged"), options)

    monkeypatch.setattr(backend, "_run", run)


def command(workshop: Workshop, room: Path, *more: str) -> list[str]:
    inputs = [str(workshop.folder / name) for name in "ab"]
    return ["merge", *inputs, "--engine", "mergekit", "-o", str(room / "out"), "-q", *more]


def test_a_process_of_its_own_and_a_complete_model(workshop: Workshop, room: Path, capsys: Capture) -> None:
    arguments = command(workshop, room, "--method", "breadcrumbs", "-p", "density=0.6", "--weights", "1,0.5")
    assert invoke([*arguments, "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    theirs = workshop.mergekit(workshop.file("""
        merge_method: breadcrumbs
        base_model: @base
        models:
          - {model: @base+@a, parameters: {weight: 1}}
          - {model: @base+@b, parameters: {weight: 0.5}}
        parameters: {density: 0.6}
        dtype: float32
        out_dtype: bfloat16
    """))
    assert distance(tensors(room / "out"), theirs) == 0
    base = Checkpoint.open(workshop.base)
    assert list(Checkpoint.open(room / "out").entries) == list(base.entries)
    assert {"README.md", "paft.json", "tokenizer.json"} <= {file.name for file in (room / "out").iterdir()}
    manifest = json.loads((room / "out" / "paft.json").read_text())
    assert manifest["recipe"]["engine"] == "mergekit" and manifest["recipe"]["weights"] == [1.0, 0.5]
    assert manifest["metrics"]["mergekit"].startswith("0.1") and report["scratch_bytes"] == 3 * 4 * sum(
        entry.rows * entry.columns for entry in base.entries.values()
    )
    assert invoke(["verify", str(room / "out")]) == 0


FILES = {
    "karcher": "merge_method: karcher\nmodels: [{model: @base+@a}, {model: @base+@b}]\nparameters: {max_iter: 5}\ndtype: float32",
    "model_stock": "merge_method: model_stock\nbase_model: @base\nmodels: [{model: @base+@a}, {model: @base+@b}]\ndtype: float32",
    "nearswap": "merge_method: nearswap\nbase_model: @base+@a\nmodels: [{model: @base+@b}]\nparameters: {t: [0, 0.01]}\n"
                "dtype: float32",
    "della": "merge_method: della\nbase_model: @base\nmodels: [{model: @base+@a, parameters: {weight: [1, 0.2], density: 0.5}}]\n"
             "parameters: {epsilon: 0.2}\ndtype: float32",
    "slerp": "merge_method: slerp\nbase_model: @base\nmodels: [{model: @base+@a}]\nparameters: {t: 0.4}\ndtype: float32",
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_runs_as_in_mergekit(workshop: Workshop, room: Path, in_process: None, case: str) -> None:
    file = workshop.file(FILES[case])
    arguments = ["merge", "-c", str(file), "--engine", "mergekit", "-o", str(room / "out"), "-q", "--seed", "7"]
    assert invoke(arguments) == 0
    assert distance(tensors(room / "out"), workshop.mergekit(file, seed=7)) < 3e-7


def test_an_adapter_that_changed_is_folded_again(workshop: Workshop, room: Path, in_process: None, tmp_path: Path) -> None:
    """mergekit's own cache is keyed by paths, and would merge the old adapter."""
    adapter = shutil.copytree(workshop.folder / "a", tmp_path / "adapter")
    arguments = ["merge", str(adapter), "--engine", "mergekit", "--method", "karcher", "-o", str(room / "out"), "--overwrite"]
    assert invoke(arguments) == 0
    before = tensors(room / "out")
    doubled = {name: 2 * tensor if "lora_" in name else tensor for name, tensor in tensors(adapter).items()}
    save_file(doubled, adapter / "adapter_model.safetensors")
    assert invoke(arguments) == 0
    name, base = "model.layers.0.mlp.up_proj.weight", tensors(workshop.base)
    ratio = (tensors(room / "out")[name] - base[name]).norm() / (before[name] - base[name]).norm()
    assert abs(float(ratio) - 4) < 1e-3  # A and B both doubled


def test_a_dry_run_says_what_scratch_it_takes(workshop: Workshop, room: Path, capsys: Capture) -> None:
    arguments = [*command(workshop, room, "--method", "multislerp", "-p", "weight={gradient: [0, 1]}"), "--dry-run"]
    assert invoke(arguments) == 0
    out = capsys.readouterr().out
    assert "of scratch" in out and "\nweight  " in out and all(len(line) < 80 or str(room) in line for line in out.splitlines())
    assert not (room / "out").exists()


BAD: list[tuple[list[str], str]] = [
    (["--method", "karchre"], "mergekit has no method 'karchre'"),
    (["--method", "karcher", "-p", "max_itr=5"], "mergekit's karcher has no parameter 'max_itr'"),
    (["--method", "karcher", "-p", "max_iter=many"], "max_iter='many' does not fit"),
    (["--method", "nearswap"], "mergekit's nearswap needs t"),
    (["--method", "della", "--dialect", "paper"], "cannot do --dialect paper"),
    (["--method", "della", "--output-kind", "lora"], "cannot do --output-kind lora"),
    (["--method", "della", "--device", "cuda"], "cannot do --device cuda"),
    (["--method", "della", "-p", "density={filter: mpl, value: 0.5}"], "filter 'mpl'"),
]


@pytest.mark.parametrize(("more", "said"), BAD, ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "")
def test_bad_settings_are_refused(workshop: Workshop, room: Path, more: list[str], said: str, capsys: Capture) -> None:
    assert_one_error(capsys, invoke(command(workshop, room, *more)), 2, said)
    assert not (room / "out").exists()


def test_a_target_that_holds_an_input_is_refused(workshop: Workshop, room: Path, capsys: Capture) -> None:
    arguments = ["merge", str(workshop.folder / "a"), "--engine", "mergekit", "--method", "karcher", "-q", "--overwrite", "-o"]
    assert_one_error(capsys, invoke([*arguments, str(workshop.folder)]), 3, "holds an input of this command")


# What can go wrong with mergekit itself


def lose_a_tensor(scratch: Path) -> None:
    found = tensors(scratch / "input-0")
    del found["model.norm.weight"]
    (scratch / "merged").mkdir()
    save_file(found, scratch / "merged" / "model.safetensors")


def give_nan(scratch: Path) -> None:
    found = tensors(scratch / "input-0")
    found["model.norm.weight"][3] = torch.nan
    (scratch / "merged").mkdir()
    save_file(found, scratch / "merged" / "model.safetensors")


@pytest.mark.parametrize(("harm", "said"), [(lose_a_tensor, "left out model.norm.weight"), (give_nan, "NaN or infinity")])
def test_a_result_that_is_not_whole_is_refused(workshop: Workshop, room: Path, harm: Any, said: str, capsys: Capture,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_run", lambda config, scratch, seed: harm(scratch))
    assert_one_error(capsys, invoke(command(workshop, room, "--method", "karcher")), 3, said)
    assert not (room / "out").exists()


@pytest.mark.parametrize(("code", "stderr", "exit_code", "said"), [
    (1, "Traceback\nRuntimeError: no such architecture\n", 3, "mergekit failed: RuntimeError: no such architecture"),
    (1, "OSError: [Errno 28] No space left on device\n", 5, "No space left"), (-9, "", 5, "exit -9"),
])  # fmt: skip
def test_mergekit_s_own_errors(workshop: Workshop, room: Path, code: int, stderr: str, exit_code: int, said: str, capsys: Capture,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(arguments: list[str], **options: Any) -> SimpleNamespace:
        seen.append(yaml.safe_load(Path(arguments[4]).read_text()))
        assert options["env"]["PYTHONHASHSEED"] == "0"
        return SimpleNamespace(returncode=code, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    assert_one_error(capsys, invoke(command(workshop, room, "--method", "karcher")), exit_code, said)
    assert not (room / "out").exists() and "+" not in str(seen[0]["models"])


def test_without_mergekit_or_room_for_the_folds(workshop: Workshop, room: Path, capsys: Capture,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(workshop, room, "--method", "karcher")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert_one_error(capsys, invoke(arguments), 5, "the folded adapters and the result need")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mergekit" else find(name, *rest))
    assert invoke(arguments) == 5
    assert "pip install" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.6")
    assert_one_error(capsys, invoke(arguments), 5, "mergekit 0.0.6 is too old")
