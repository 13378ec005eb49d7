"""Every LoRA variant of PEFT against its own `merge_and_unload` in float64, over linear layers, Conv1D and embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from variantkit import assert_exact, make, own_deltas, peft_deltas, save_model

from paft.adapter import WEIGHTS
from paft.variants import tree_sum

ALL = ["q_proj", "o_proj", "down_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*up_proj": 1}, "use_rslora": True}),
    "layers": ("llama", {"layers_to_transform": [1]}),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}),
    "dora-rslora": ("llama", {"target_modules": ALL, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 1}}),
    "dora-embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias-all": ("gpt_neox", {"target_modules": ["dense"], "bias": "all"}),
    "lora-bias-and-bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-rslora": ("llama", {"target_modules": ["embed_tokens"], "use_rslora": True, "rank_pattern": {"embed_tokens": 2}}),
    "embedding-gemma": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "saved": ("llama", {"modules_to_save": ["lm_head", "norm", "layers.1.mlp"]}),
    "saved-embedding": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "ln_f"]}),
    "tokens": ("llama", {"trainable_token_indices": [7, 3, 39]}),
    "tokens-by-module": ("llama", {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-unsaid": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": False}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wpe"], "use_dora": True}),
    "conv1d-bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"}),
    "conv1d-embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "lm_head", "c_fc"]}),
    "renamed-head": ("gpt_neox", {"target_modules": ["lm_head", "embed_in", "query_key_value"]}),
    "moe-attention": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "moe-gate-up": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}),
    "moe-experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "moe-router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "down_proj"]}),
    "moe-ranks": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"down_proj": 2},
        },
    ),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_model(folder / kind, kind) for kind in {kind for kind, _ in VARIANTS.values()}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_delta_is_that_of_merge_and_unload(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    kind, options = VARIANTS[variant]
    adapter = make(bases[kind], tmp_path / "adapter", **options)
    assert_exact(own_deltas(bases[kind], adapter), peft_deltas(bases[kind], adapter, tmp_path / "merged"))


@pytest.mark.parametrize("variant", ["dora", "dora-embedding", "conv1d-dora", "saved", "tokens", "moe-experts", "lora-bias"])
def test_tiles_have_the_same_bits(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    kind, options = VARIANTS[variant]
    adapter = make(bases[kind], tmp_path / "adapter", **options)
    whole = own_deltas(bases[kind], adapter)
    for elements in (1, 32 * 5, 32 * 64):
        cut = own_deltas(bases[kind], adapter, elements)
        assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["rslora", "dora-embedding", "conv1d-bias", "tokens", "moe-experts", "layers"])
def test_narrow_adapters_are_widened(bases: dict[str, Path], tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    """PEFT too computes in float32 with what was saved in half precision. (Copies of the base's own stay as they are.)"""
    kind, options = VARIANTS[variant]
    adapter = make(bases[kind], tmp_path / "adapter", **options)
    tensors = load_file(adapter / WEIGHTS).items()
    save_file({name: tensor if "base_layer" in name else tensor.to(dtype) for name, tensor in tensors}, adapter / WEIGHTS)
    got, want = own_deltas(bases[kind], adapter), peft_deltas(bases[kind], adapter, tmp_path / "merged")
    for name in got:
        assert float((got[name].double() - want[name]).norm()) <= 1e-6 * float(want[name].norm()), name


def test_dora_keeps_its_digits_near_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """W' - W of nearby float32 numbers would lose most of a small update; PEFT's own float32 merge does."""
    adapter = make(bases["llama"], tmp_path / "adapter", target_modules=ALL, use_dora=True)
    tensors = load_file(adapter / WEIGHTS)
    before = make_untrained(bases["llama"], tmp_path / "start")
    save_file({name: before[name] + 1e-5 * (tensors[name] - before[name]) for name in tensors}, adapter / WEIGHTS)
    got, want = own_deltas(bases["llama"], adapter), peft_deltas(bases["llama"], adapter, tmp_path / "merged")
    assert max(float(tensor.abs().max()) for tensor in got.values()) < 1e-5
    for name in got:
        assert float((got[name].double() - want[name]).norm()) <= 1e-3 * float(want[name].norm()), name


def make_untrained(base: Path, path: Path) -> dict[str, torch.Tensor]:
    from peft import LoraConfig, get_peft_model
    from variantkit import load

    get_peft_model(load(base), LoraConfig(r=3, lora_alpha=7, target_modules=ALL, use_dora=True)).save_pretrained(path)
    return load_file(path / WEIGHTS)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), dim=st.integers(0, 1))
def test_tree_sum(rows: int, columns: int, dim: int) -> None:
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows * columns))
    assert torch.allclose(tree_sum(values.clone(), dim), values.sum(dim), atol=1e-12)
    if dim == 1:  # a row's sum does not depend on the rows beside it
        assert torch.equal(tree_sum(values.clone(), 1)[-1:], tree_sum(values[-1:].clone(), 1))
