"""The frozen base in bfloat16 or 4 bits: what is trained stays float32, and the record names the base itself.

The tests of 4 bits run where bitsandbytes is (0.50 does it on a CPU).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_resume import Killed, die_at, killed, records
from test_train_stage import PREF_ROWS, SFT_ROWS, SHORT, logits, refused, sft_recipe, write_rows
from trainkit import distance, saved, sft_rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from paft.adapter import read_adapter
from paft.errors import ResourceError, UsageError
from paft.models import load_model
from paft.provenance import content_hash
from paft.recipe import DpoRecipe
from paft.train import artefact
from paft.train.stage import plan, train

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def wide(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose layers are multiples of 64, the blocks that bitsandbytes packs."""
    path = tmp_path_factory.mktemp("wide") / "base"
    config = LlamaConfig.from_pretrained(tiny_base, hidden_size=64, intermediate_size=128, head_dim=16)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((tiny_base / name).read_bytes())
    return path


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers whose adapters are written."""
    found: list[Any] = []
    save = artefact.save
    monkeypatch.setattr(artefact, "save", lambda trainer, *rest: (found.append(trainer), save(trainer, *rest)))
    return found


def test_a_bfloat16_base_is_frozen_and_the_factors_are_float32(tiny_base: Path, tmp_path: Path, live: list[Any]) -> None:
    manifest = train(sft_recipe(tiny_base, dtype="bfloat16", l1=1e-4), tmp_path / "a", rows=SFT_ROWS, quiet=True)
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in live[0].model.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    assert {tensor.dtype for tensor in saved(tmp_path / "a").values()} == {torch.float32}
    assert manifest["base"]["content_sha256"] == content_hash(tiny_base)
    train(sft_recipe(tiny_base, l1=1e-4), tmp_path / "b", rows=SFT_ROWS, quiet=True)
    assert 0 < distance(saved(tmp_path / "a"), saved(tmp_path / "b")) < 0.05, "close to that of a float32 base, but not the same"


def test_an_adapter_is_folded_in_before_the_base_is_rounded(tiny_base: Path, make_adapter: Any) -> None:
    on = make_adapter(tiny_base, 1)
    wide, narrow = (load_model(str(tiny_base), on=str(on), dtype=kind) for kind in ("float32", "bfloat16"))
    for (name, exact), rounded in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(rounded, exact.bfloat16()), name


@pytest.mark.parametrize("fields", [{"full": True, "dtype": "bfloat16"}, {"full": True, "quantize": "4bit"}])
def test_full_fine_tuning_needs_float32(fields: Any, tiny_base: Path, tmp_path: Path) -> None:
    assert "float32" in refused(UsageError, sft_recipe(tiny_base, **fields), tmp_path / "a", SFT_ROWS, exit_code=2).message


@pytest.mark.skipif(HAS_BNB, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_remedy_is_named(tiny_base: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_base, quantize="4bit", data=write_rows(tmp_path / "d.jsonl", sft_rows(4)))
    assert "paft[quant]" in str(refused(ResourceError, recipe, tmp_path / "a", SFT_ROWS, exit_code=5).hint)
    with pytest.raises(ResourceError, match="needs bitsandbytes"):
        plan(recipe, tmp_path / "a")


def test_a_quantised_base_does_not_go_with_on(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_base, quantize="4bit", on=str(make_adapter(tiny_base, 1)))
    assert "quantize does not go with --on" in refused(UsageError, recipe, tmp_path / "a", SFT_ROWS, exit_code=2).message


@needs_bnb
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_qlora_trains_float32_factors_on_four_bits(kind: str, wide: Path, tmp_path: Path, live: list[Any]) -> None:
    recipe = sft_recipe(wide, quantize="4bit", l1=1e-4)
    if kind == "dpo":
        recipe = DpoRecipe(**{**recipe.model_dump(), "kind": "train-dpo", "trainer": {**SHORT, "learning_rate": 1e-2}})
    manifest = train(recipe, tmp_path / "a", rows=SFT_ROWS if kind == "sft" else PREF_ROWS, quiet=True)
    model = live[0].model
    assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert len(read_adapter(tmp_path / "a").factors) == 14
    assert manifest["base"]["content_sha256"] == content_hash(wide) and manifest["recipe"]["quantize"] == "4bit"
    if kind == "dpo":
        first = next(record for record in records(tmp_path / "a") if "loss" in record)
        assert first["rewards/margins"] == 0
    plain = AutoModelForCausalLM.from_pretrained(wide)
    assert (logits(load_model(str(wide), quantize="4bit")) - logits(plain)).abs().max() > 1e-3, "4 bits are not 32"


@needs_bnb
def test_qlora_resumes_to_the_bit(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sft_recipe(wide, quantize="4bit", lora={"dropout": 0.1}, trainer={"save_steps": 1})
    train(recipe, tmp_path / "unbroken", rows=SFT_ROWS, quiet=True)
    with monkeypatch.context() as patch:
        die_at(2, killed, patch.setattr)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "a", rows=SFT_ROWS, quiet=True)
    train(recipe, tmp_path / "a", rows=SFT_ROWS, resume=True, quiet=True)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "unbroken")
