"""`paft delta` and the outputs of `paft merge` that are no model, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory

from paft.cli import invoke
from paft.merge.deltafile import CONFIG


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def said(world: World, capsys: Capture, *arguments: str) -> list[str]:
    """The lines of a command that works, which fit the terminal but for the output's path."""
    capsys.readouterr()
    assert invoke(list(arguments)) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "error" not in err and all(len(line.replace(str(world.folder), "")) < 80 for line in lines), lines
    return lines


def test_an_adapter_to_a_delta_file_and_back(world: World, capsys: Capture) -> None:
    plan = said(world, capsys, "delta", str(world.one), "-o", str(world.out), "--dry-run")
    assert plan[0].startswith("would write ") and "14 tensors" in plan[1] and not world.out.exists()
    lines = said(world, capsys, "delta", str(world.one), "-o", str(world.out))
    assert "14 low_rank" in lines[1] and lines[2] == "Keeps 100.0% of the changed entries, exactly."
    assert lines[-1] == f"next: paft merge {world.out} --method task_arithmetic"
    command = [*lines[-1].removeprefix("next: paft ").split(), "-o", str(world.folder / "model")]
    assert said(world, capsys, *command)[0].startswith(f"{world.folder / 'model'}: 14 tensors merged")
    assert said(world, capsys, "verify", str(world.out))
    lora = said(world, capsys, "delta", str(world.out), "--to-lora", "-o", str(world.folder / "lora"))
    assert lora[1].endswith("rank 4") and lora[2].startswith("Exact")


def test_pruning_and_a_narrow_type(world: World, capsys: Capture) -> None:
    lines = said(world, capsys, "delta", str(world.one), "-o", str(world.out), "--keep-largest", "0.1", "--dtype", "bfloat16")
    assert lines[2].startswith("Keeps 10.0% of the changed entries, relative error 0.")
    result = json.loads("\n".join(said(world, capsys, "delta", str(world.one), "-o", str(world.out), "--overwrite", "--json",
                                       "--threshold", "0.05")))
    assert 0 < result["relative_error"] < 1 and result["output_kind"] == "delta"
    assert str(world.folder) not in (world.out / "paft.json").read_text() + (world.out / "README.md").read_text()


def test_a_merge_to_an_adapter_says_its_error(world: World, capsys: Capture) -> None:
    plan = said(world, capsys, *world.merge("--output-kind", "lora", "--rank", "3", "--dry-run"))
    assert plan[1].startswith("14 tensors changed") and not world.out.exists()
    lines = said(world, capsys, *world.merge("--output-kind", "lora", "--rank", "3"))
    assert lines[1].endswith("rank 3") and lines[2].startswith("Relative error 0.")
    estimate = json.loads("\n".join(said(world, capsys, *world.merge("--output-kind", "lora", "--rank", "3", "--dry-run",
                                                                     "--overwrite", "--json"))))
    size = (world.out / "adapter_model.safetensors").stat().st_size
    assert 0 < size - estimate["bytes"]["written"] < 20_000  # the header
    lines = said(world, capsys, *world.merge("--output-kind", "delta", "--overwrite"))
    assert "dense" in lines[1] and lines[2].endswith("exactly.") and (world.out / CONFIG).is_file()


def pruned(world: World, *more: str) -> list[str]:
    return ["delta", str(world.one), "-o", str(world.out), *more]


def spoil_nan(world: World) -> list[str]:
    from safetensors.torch import load_file, save_file

    assert invoke(pruned(world, "--keep-largest", "0.5", "-q")) == 0
    arrays = load_file(world.out / "delta.safetensors")
    next(values for name, values in arrays.items() if name.endswith("#values"))[0] = float("nan")
    save_file(arrays, world.out / "delta.safetensors")
    return ["merge", str(world.out), "--method", "task_arithmetic", "-o", str(world.folder / "model")]


def spoil_base(world: World) -> list[str]:
    from conftest import save_base

    assert invoke(pruned(world, "-q")) == 0
    other = save_base(world.folder / "other", tied=False, seed=9)
    return ["merge", str(world.out), "--base", str(other), "-o", str(world.folder / "model")]


BAD: list[tuple[Callable[[World], list[str]], int, str]] = [
    (lambda w: pruned(w, "--keep-largest", "1.5"), 2, "(0, 1]"),
    (lambda w: pruned(w, "--threshold", "-1"), 2, "not a positive number"),
    (lambda w: pruned(w, "--threshold", "1", "--keep-largest", "0.1"), 2, "exclude each other"),
    (lambda w: pruned(w, "--keep-largest", "0.1", "--to-lora"), 2, "exclude each other"),
    (lambda w: pruned(w, "--dtype", "float8"), 2, "no dtype 'float8'"),
    (lambda w: pruned(w, "--rank", "4"), 2, "--rank"),
    (lambda w: pruned(w, "--partial"), 2, "--partial is for --to-lora"),
    (lambda w: pruned(w, "--to-lora", "--rank", "4", "--max-error", "0.1"), 2, "one of the two"),
    (lambda w: ["delta", str(w.base), "-o", str(w.out)], 2, "needs its base"),
    (lambda w: w.merge("--output-kind", "lora"), 2, "not of low rank"),
    (lambda w: w.merge("--rank", "4"), 2, "--rank"),
    (lambda w: w.merge("--output-kind", "lora", "--rank", "0"), 2, "--rank"),
    (lambda w: ["delta", str(w.base), "--base", str(w.base), "-o", str(w.out)], 3, "the base itself"),
    (lambda w: pruned(w, "--threshold", "1e9"), 3, "zero everywhere"),
    (lambda w: ["delta", str(w.one), "-o", str(w.one), "--overwrite"], 3, "holds an input"),
    (spoil_nan, 3, "holds NaN"),
    (spoil_base, 3, "is not the tensor that the delta was made on"),
    (lambda w: ["delta", "./nothing", "-o", str(w.out)], 4, "./nothing"),
]


@pytest.mark.parametrize(("spoil", "code", "message"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_bad_input_is_one_line_and_writes_nothing(
    spoil: Callable[[World], list[str]], code: int, message: str, world: World, capsys: Capture
) -> None:
    arguments = spoil(world)
    before = sorted(world.folder.rglob("*"))
    capsys.readouterr()
    assert_one_error(capsys, invoke(arguments), code, message)
    assert sorted(world.folder.rglob("*")) == before
