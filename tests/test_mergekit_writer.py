"""`--export-mergekit`: the file makes the same merge again, by paft and by mergekit; what it cannot say is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, assert_one_error
from conftest import AdapterFactory
from mergekitkit import Workshop, distance, document, tensors

from paft.cli import invoke


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, make_adapter: AdapterFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("mergekit"), make_adapter)


def command(workshop: Workshop, recipe: str, *more: str) -> list[str]:
    return ["merge", "-c", str(workshop.file(recipe, "ours.yaml")), "-q", *more]


OURS = {
    "ties, values for each adapter": """
        method: ties
        adapters: [@a, @b]
        weights: [0.6, 0.3]
        parameters: {density: [0.5, 0.2], lambda: 0.8}
    """,
    "layers, kinds and gradients": """
        method: ties
        adapters:
          - adapter: @a
            weight: [1, 0.25, 0.5]
            density: [{layers: 1-2, value: 0.3}, {filter: mlp, layers: 3, value: 0.6}, {filter: lm_head, value: 0.9}]
          - adapter: @b
            weight: {filter: self_attn, value: 0.7}
        parameters:
          weight: [{filter: mlp, layers: 0-2, gradient: [0.1, 0.9]}, {value: 2}]
          density: 0.4
          lambda: [{layers: 0, value: 0.5}, {value: 1.0}]
          normalize: {gradient: [true, false]}
    """,
    "task_arithmetic of an adapter and a model": """
        method: task_arithmetic
        base: @base
        adapters: [@a, {adapter: @m, weight: 0.25}]
        parameters: {lambda: {gradient: [1, 0.5]}}
    """,
    "linear with the base among the inputs": """
        method: linear
        base: @base
        adapters: [@a, @base, @b]
        weights: [0.5, 0.25, 1.25]
    """,
    "slerp of deltas": """
        method: slerp
        adapters: [@a, @b]
        parameters: {t: [{filter: mlp, value: 0.25}, {value: [0.25, 0.75]}]}
    """,
    "slerp of deltas by weights": """
        method: slerp
        adapters: [@a, @b]
        weights: [1, 3]
    """,
    "slerp of weights": """
        method: slerp
        adapters: [@a, @b]
        weights: [3, 1]
        parameters: {space: weight}
    """,
    "another type": """
        method: task_arithmetic
        adapters: [@a]
        dtype: bfloat16
    """,
}


@pytest.mark.parametrize("case", OURS)
def test_the_file_makes_the_same_merge_in_paft_and_in_mergekit(workshop: Workshop, case: str, capsys: Capture) -> None:
    arguments, exported = command(workshop, OURS[case]), workshop.folder / "e.yml"
    straight = workshop.folder / f"straight-{len(list(workshop.folder.iterdir()))}"
    assert invoke([*arguments, "-o", str(straight)]) == 0
    assert invoke([*arguments, "--export-mergekit", str(exported), "--overwrite"]) == 0
    capsys.readouterr()
    again, theirs = workshop.paft(exported), workshop.mergekit(exported)
    # t and weights say the same in slerp, but (1 - t) + t may differ from 1 in its last bit.
    assert distance(again, tensors(straight)) < (1e-8 if "slerp" in case else 1e-12)
    assert distance(again, theirs) < (1e-3 if "type" in case else 3e-7)


def test_the_file_is_what_a_user_of_mergekit_would_write(workshop: Workshop) -> None:
    file = workshop.folder / "file.yml"
    assert invoke([*command(workshop, OURS["layers, kinds and gradients"]), "--export-mergekit", str(file)]) == 0
    found = document(file)
    base = str((workshop.folder / "base").resolve())
    assert found["base_model"] == base and found["merge_method"] == "ties"
    assert (found["dtype"], found["out_dtype"]) == ("float32", "float32")
    first = found["models"][0]
    assert first["model"] == f"{base}+{workshop.folder / 'a'}"
    assert first["parameters"]["weight"] == [1, 0.25, 0.5]
    assert first["parameters"]["density"][:2] == [{"filter": f"model.layers.{i}.", "value": 0.3} for i in (1, 2)]
    text = file.read_text()
    assert "--lora-merge-dtype float32" in text and "[1, 0.25, 0.5]" in text


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "dialect": ("method: ties\nadapters: [@a, @b]", ["--dialect", "paper"], "cannot express the dialect 'paper'"),
    "method": ("method: magnitude_prune\nadapters: [@a, @b]", [], "no method that does what magnitude_prune does"),
    "an adapter as the result": ("method: linear\nadapters: [@a, @b]", ["--output-kind", "lora"], "--output-kind lora"),
    "space by layer": ("method: slerp\nadapters: [@a, @b]\nparameters: {space: [{layers: 0, value: weight}, {value: delta}]}", [],
                       "no method that does what slerp does"),
    "weights of slerp by layer": ("method: slerp\nadapters: [@a, {adapter: @b, weight: [1, 2]}]\nparameters: {space: weight}", [],
                                  "takes t, and these weights vary"),
    "the base as an input": ("method: ties\nbase: @base\nadapters: [@a, @base]", [], "in mergekit's ties the base is no input"),
    "a sum of models": ("method: linear\nadapters: [@a, @b]\nparameters: {normalize: false}", [], "the base is scaled"),
    "rounding": ("method: ties\nadapters: [@a, @b]", ["--rounding", "stochastic"], "cannot express --rounding stochastic"),
    "a value out of range": ("method: ties\nadapters: [@a, @b]", ["-p", "density=2"], "density must be in (0, 1]"),
    "t and weights": ("method: slerp\nadapters: [@a, @b]", ["-p", "t=0.3", "--weights", "1,2"], "slerp takes t or weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mergekit_cannot_express_is_refused_by_name(workshop: Workshop, case: str, capsys: Capture) -> None:
    recipe, more, said = REFUSED[case]
    target = workshop.folder / "refused.yml"
    arguments = command(workshop, recipe, *more, "--export-mergekit", str(target))
    assert_one_error(capsys, invoke(arguments), 2, said)
    assert not target.exists()


def test_paths_that_mergekit_would_misread_and_files_that_exist(workshop: Workshop, tmp_path: Path, capsys: Capture) -> None:
    odd = tmp_path / "a+b"
    odd.symlink_to(workshop.folder / "a")
    target = tmp_path / "e.yml"
    arguments = ["merge", str(odd), str(workshop.folder / "b"), "--export-mergekit", str(target), "-q"]
    assert_one_error(capsys, invoke(arguments), 3, "a+b: + and @ have a meaning there")
    target.write_text("mine")
    good: Any = ["merge", str(workshop.folder / "a"), "--export-mergekit", str(target), "-q"]
    assert_one_error(capsys, invoke(good), 3, "e.yml exists")
    assert target.read_text() == "mine"


def test_a_base_of_several_types_needs_a_dtype(workshop: Workshop, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    from safetensors.torch import save_file

    base = shutil.copytree(workshop.base, tmp_path / "mixed")
    mixed = {name: tensor.bfloat16() if "mlp" in name else tensor for name, tensor in tensors(base).items()}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    arguments = ["merge", str(workshop.folder / "a"), "--base", str(base), "--export-mergekit", str(tmp_path / "e.yml"), "-q"]
    assert_one_error(capsys, invoke(arguments), 3, "bfloat16 and float32, and mergekit writes one type")
    assert invoke([*arguments, "--dtype", "bfloat16"]) == 0
