"""Every recipe in adapters/ and merges/ loads, says when to use it, and dry-runs through the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

from paft.catalog import catalog, kind_of
from paft.cli import invoke
from paft.recipe import KINDS, SftRecipe, load
from paft.yamlfile import read_yaml

RECIPES = catalog()
OF_KIND = {kind: [name for name in RECIPES if kind_of(RECIPES[name]) == kind] for kind in KINDS}
Capture = pytest.CaptureFixture[str]


def test_the_catalogue_is_what_lies_in_the_two_folders() -> None:
    root = Path(__file__).resolve().parents[1]
    assert set(RECIPES.values()) == {*root.glob("adapters/*.yaml"), *root.glob("merges/*.yaml")}
    assert all(OF_KIND.values()), OF_KIND


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_for_and_names_no_machine(name: str) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    assert text.startswith("# ") and "kind" in read_yaml(RECIPES[name]).data
    assert "/work/" not in text and "/home/" not in text


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in OF_KIND["run"]])
def test_a_recipe_loads_as_its_kind(name: str) -> None:
    recipe = load(KINDS[kind_of(RECIPES[name])], RECIPES[name])
    if isinstance(recipe, SftRecipe):
        assert recipe.model is None and recipe.data is None
        assert recipe.l1 == 0 or 1e-4 <= recipe.l1 <= 1e-3  # PAFT's validated range


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return str(write_jsonl(folder / "chat.jsonl", chat_rows(100))), str(write_jsonl(folder / "pairs.jsonl", pair_rows(100)))


@pytest.fixture(scope="module")
def neox(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of Pythia's architecture."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    path = tmp_path_factory.mktemp("neox") / "base"
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1,
                                     intermediate_size=48, max_position_embeddings=128, bos_token_id=None)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((tiny_base / name).read_bytes())
    return path


@pytest.mark.parametrize("name", [*OF_KIND["train-sft"], *OF_KIND["train-dpo"], *OF_KIND["train-joint"]])
def test_adapter_recipes_dry_run(name: str, files: tuple[str, str], tiny_base: Path, neox: Path, tmp_path: Path,
                                 capsys: Capture) -> None:
    kind = kind_of(RECIPES[name])
    base = neox if "pythia" in name else tiny_base
    here = [] if importlib.util.find_spec("bitsandbytes") else ["--set", "quantize=null"]
    data = {"train-sft": ["-d", files[0]], "train-dpo": ["-d", files[1]],
            "train-joint": ["--sft-data", files[0], "--pref-data", files[1]]}[kind]
    assert invoke([kind, "-c", name, "-m", str(base), *data, *here, "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] > 0 and plan["adapter_bytes"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OF_KIND["merge"])
def test_merge_recipes_dry_run(name: str, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, capsys: Capture) -> None:
    adapters = [str(make_adapter(tiny_base, seed)) for seed in (1, 2)]
    arguments = ["merge", *adapters, "-c", name, "-o", str(tmp_path / "out")]
    assert invoke([*arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["merged"] == 14  # seven linear layers in each of two blocks
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OF_KIND["run"])
def test_pipelines_dry_run_on_other_models_and_data(name: str, files: tuple[str, str], tiny_base: Path, tmp_path: Path,
                                                    capsys: Capture) -> None:
    sets = [f"model={tiny_base}", f"data.sft={files[0]}", f"data.pref={files[1]}"]
    arguments = ["run", name, *(part for item in sets for part in ("--set", item)), "-o", str(tmp_path / "out"), "--dry-run"]
    assert invoke([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"] == str(tiny_base) and plan["rows"]["sft"]["train"] + plan["rows"]["sft"]["test"] <= 100
    assert invoke(arguments) == 0
    assert all(len(line) < 80 or str(tmp_path) in line for line in capsys.readouterr().out.splitlines())
    assert not (tmp_path / "out").exists()


def test_the_pipeline_for_your_own_data_says_what_it_needs(capsys: Capture) -> None:
    assert invoke(["run", "paft"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "model, data.sft, data.pref are missing" in error
    assert hint.strip() == "try: --set model=... --set data.sft=... --set data.pref=..."
