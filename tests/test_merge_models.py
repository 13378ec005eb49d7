"""Merged models of many architectures, types and layouts: plain transformers loads them and they compute base + adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from variantkit import edit_config, load, make, own_deltas, peft_deltas, save_model, tensors_of, wrapped

from paft.adapter import WEIGHTS
from paft.checkpoint import INDEX
from paft.merge.engine import merge

TOKENS = torch.arange(12).view(1, 12)
LINEAR = "all-linear"
# kind, tied, largest file, what is trained
MODELS: dict[str, tuple[str, bool, str | None, dict[str, Any]]] = {
    "llama": ("llama", False, None, {"target_modules": LINEAR, "use_dora": True}),
    "llama-tied-sharded": ("llama", True, "10KB", {"target_modules": LINEAR, "trainable_token_indices": [3]}),
    "gpt2-tied": ("gpt2", True, None, {"target_modules": LINEAR, "bias": "all"}),
    "gpt2-sharded": ("gpt2", False, "10KB", {"target_modules": ["c_attn", "lm_head", "wte"], "use_dora": True}),
    "neox": ("gpt_neox", False, "10KB", {"target_modules": ["lm_head", "query_key_value"], "modules_to_save": ["embed_in"]}),
    "neox-tied": ("gpt_neox", True, None, {"target_modules": LINEAR, "lora_bias": True}),
    "qwen2": ("qwen2", False, "10KB", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "bias": "lora_only"}),
    "qwen3-tied": ("qwen3", True, None, {"target_modules": LINEAR, "modules_to_save": ["q_norm"]}),
    "gemma2-tied": ("gemma2", True, "10KB", {"target_modules": LINEAR, "trainable_token_indices": [3]}),
    "gemma3": ("gemma3_text", False, None, {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "mixtral": ("mixtral", False, "20KB", {"target_modules": ["q_proj", "o_proj"]}),
    "mixtral-experts": ("mixtral", True, None, {"target_modules": LINEAR}),
    "qwen3-moe": ("qwen3_moe", False, "20KB", {"target_modules": LINEAR}),
}


@pytest.mark.parametrize("case", MODELS)
def test_logits_are_those_of_base_and_adapter(tmp_path: Path, case: str) -> None:
    kind, tied, shard, options = MODELS[case]
    base = save_model(tmp_path / "base", kind, tied=tied, shard=shard)
    assert (base / INDEX).is_file() == (shard is not None)
    adapter = make(base, tmp_path / "adapter", **options)
    report = merge([str(adapter)], base=None, method="task_arithmetic", parameters={}, weights=None, out=tmp_path / "out")
    assert report["tensors"]["merged"] > 1
    with torch.no_grad():
        want, got = wrapped(base, adapter)(TOKENS).logits, load(tmp_path / "out")(TOKENS).logits
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load(base)(TOKENS).logits, want, atol=1e-2)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "gpt2-sharded", "neox", "qwen2", "gemma2-tied", "mixtral-experts"])
def test_a_narrow_base_is_folded_in_float64_and_rounded_once(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    kind, tied, shard, options = MODELS[case]
    base = save_model(tmp_path / "base", kind, tied=tied, dtype=dtype, shard=shard)
    adapter = make(base, tmp_path / "adapter", **options)
    merge([str(adapter)], base=str(base), method="task_arithmetic", parameters={}, weights=None, out=tmp_path / "out")
    deltas = peft_deltas(base, adapter, tmp_path / "peft")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    for name, delta in deltas.items():
        exact = before[name].double() + delta
        error, least = (after[name].double() - exact).abs(), (exact.to(dtype).double() - exact).abs()
        assert float((error - least).max()) <= 1e-6, name  # another value only where float32 cannot tell which is nearer


def test_experts_of_an_adapter_from_transformers_4(tmp_path: Path) -> None:
    """Before version 5 each expert was a module of its own: its LoRA names the tensors of the file."""
    base = save_model(tmp_path / "base", "mixtral")
    adapter = make(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors, generator = load_file(adapter / WEIGHTS), torch.Generator().manual_seed(0)
    for name, tensor in tensors_of(base).items():
        if ".experts." in name or ".gate." in name:
            out_features, in_features = tensor.shape
            for side, shape in {"A": (3, in_features), "B": (out_features, 3)}.items():
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"
                tensors[key] = 0.1 * torch.randn(shape, generator=generator)
    save_file(tensors, adapter / WEIGHTS)
    edit_config(adapter, target_modules=["q_proj", "w1", "w2", "w3", "gate"])
    got, want = own_deltas(base, adapter), peft_deltas(base, adapter, tmp_path / "peft")
    assert len(got) == 2 * (1 + 1 + 3 * 3)
    for name in got:
        assert float((got[name].double() - want[name]).norm()) <= 1e-6 * float(want[name].norm()), name


def test_a_base_whose_head_the_configuration_does_not_mention(tmp_path: Path) -> None:
    """Without tie_word_embeddings in its file, Gemma is tied and GPT-NeoX is not, as their classes have it."""
    for kind, tied in {"gemma2": True, "gpt_neox": False}.items():
        base = save_model(tmp_path / kind, kind, tied=tied)
        config = json.loads((base / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config))
        adapter = make(base, tmp_path / f"{kind}-adapter", target_modules=LINEAR, trainable_token_indices=[3])
        merge([str(adapter)], base=None, method="ties", parameters={}, weights=None, out=tmp_path / f"{kind}-out")
        with torch.no_grad():
            want, got = wrapped(base, adapter)(TOKENS).logits, load(tmp_path / f"{kind}-out")(TOKENS).logits
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
