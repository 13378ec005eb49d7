"""Adapters against PEFT: scales, patterns, exact concatenation; what has no fixed ΔW is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file

from paft.adapter import CONFIG, WEIGHTS, Adapter, concatenate, read_adapter, save_adapter
from paft.errors import MismatchError, NotFoundError

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"_proj": 99, "mlp.down_proj": 5, "model.layers.0.self_attn.q_proj": 1},
    },
    "patterns-rslora": {"rank_pattern": {"(q|k)_proj": 2}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


def peft_deltas(base: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> dict[str, torch.Tensor]:
    """What PEFT itself says ΔW is, module by module, summed with weights."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    out: dict[str, torch.Tensor] = {}
    for path, weight in zip(adapters, weights or (1.0,) * len(adapters), strict=True):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                out[name] = out.get(name, 0) + weight * module.get_delta_weight("default").detach()
    return out


def own_deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: f.scale * f.B @ f.A for name, f in adapter.factors.items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_delta_is_what_peft_says(tiny_base: Path, make_adapter: AdapterFactory, variant: str) -> None:
    path = make_adapter(tiny_base, 1, **VARIANTS[variant])
    adapter = read_adapter(path)
    assert_same(own_deltas(adapter), peft_deltas(tiny_base, path))
    assert adapter.base_model == str(tiny_base)
    assert adapter.name == "adapter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_factors_are_widened(tiny_base: Path, make_adapter: AdapterFactory, dtype: torch.dtype) -> None:
    path = make_adapter(tiny_base, 1)
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(narrow, path / WEIGHTS)
    factors = read_adapter(path).factors["model.layers.0.mlp.up_proj"]
    assert factors.A.dtype == factors.B.dtype == torch.float32
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(factors.A, narrow[key].float())


def test_concatenation_is_the_weighted_sum(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    """Unequal ranks, rsLoRA and unlike targets; loaded back by PEFT, ΔW is Σ w ΔW."""
    paths = [
        make_adapter(tiny_base, 1),
        make_adapter(tiny_base, 2, r=3, use_rslora=True, target_modules=["q_proj", "up_proj"]),
        make_adapter(tiny_base, 3, r=2, rank_pattern={"v_proj": 5}),
    ]
    weights = (0.5, -2.0, 0.0)
    save_adapter(tmp_path / "sum", *concatenate([read_adapter(path) for path in paths], weights))
    want = peft_deltas(tiny_base, *paths, weights=weights)
    assert_same(peft_deltas(tiny_base, tmp_path / "sum"), want)
    assert_same(own_deltas(read_adapter(tmp_path / "sum")), want)


def test_concatenation_of_equal_shapes_keeps_a_plain_config(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    """Tools that do not know rank_pattern can load it."""
    config, tensors = concatenate([read_adapter(make_adapter(tiny_base, seed)) for seed in (1, 2)], [1.0, 1.0])
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert {min(tensor.shape) for tensor in tensors.values()} == {8}


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return edit


UP = "base_model.model.model.layers.0.mlp.up_proj."


def poison(value: float) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors[UP + "lora_B.weight"][0].fill_(value))


def truncate(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])


def pickle_only(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


def add(name: str, *shape: int) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: torch.ones(shape)}))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (poison(float("nan")), r"layers\.0\.mlp\.up_proj\.lora_B\.weight holds NaN"),
    "inf": (poison(float("inf")), "holds NaN or infinity"),
    "truncated": (truncate, "complete safetensors"),
    "pickle": (pickle_only, "pickled"),
    "not-lora": (edit_config(peft_type="IA3"), "IA3"),
    "no-type": (edit_config(peft_type=None), "only LORA"),
    "dora-unsaid": (edit_config(use_dora=True), r"use_dora is set but .* has no magnitude"),
    "lora-bias-unsaid": (edit_config(lora_bias=True), r"lora_bias is set but .* has no bias"),
    "token-rows": (edit_config(trainable_token_indices=[1]), "trainable_token_indices"),
    "parameters": (edit_config(target_parameters=["mlp.gate_up_proj"], target_modules=["q_proj"]), "cannot be told"),
    "activated": (edit_config(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "kasa": (edit_config(kasa_config={"beta": 1}), "kasa_config"),
    "xlora": (edit_config(peft_type="XLORA"), "XLORA"),
    "adalora": (edit_config(peft_type="ADALORA"), "ADALORA"),
    "loftq": (edit_config(init_lora_weights="loftq"), "init_lora_weights=loftq"),
    "pattern": (edit_config(rank_pattern={"(": 2}), "no regular expression"),
    "alpha": (edit_config(alpha_pattern={"up_proj": float("inf")}), "alpha inf"),
    "no-rank-at-all": (edit_config(r=0), "rank 0"),
    "pissa": (edit_config(init_lora_weights="pissa_niter_4"), "init_lora_weights=pissa_niter_4"),
    "no-rank": (edit_config(r=None), "r should be a whole number, not None"),
    "true-rank": (edit_config(r=True), "r should be a whole number, not True"),
    "alpha-word": (edit_config(lora_alpha="16"), "lora_alpha should be a number, not '16'"),
    "pattern-list": (edit_config(rank_pattern=["up_proj"]), "rank_pattern should be a mapping"),
    "alpha-number": (edit_config(alpha_pattern=3), "alpha_pattern should be a mapping"),
    "base-number": (edit_config(base_model_name_or_path=5), "base_model_name_or_path should be a name"),
    "wrong-rank": (edit_config(rank_pattern={"up_proj": 3}), "should have rank 3"),
    "not-json": (lambda path: (path / CONFIG).write_text("{") and None, "not JSON"),
    "leftover": (add("base_model.model.lm_head.lora_C.weight", 4), r"lm_head\.lora_C\.weight.*nothing would use it"),
    "no-prefix": (add("lm_head.lora_A.weight", 4, 4), "nothing would use it"),
    "magnitude": (add(UP + "lora_magnitude_vector", 48), "use_dora is not set"),
    "magnitude-alone": (add("base_model.model.x.lora_magnitude_vector", 4), "belongs to no LoRA factors"),
    "embedding": (add("base_model.model.model.embed_tokens.lora_embedding_A", 4, 4), "without its partner"),
    "lora-bias": (add(UP + "lora_B.bias", 48), "lora_bias is not set"),
    "convolution": (add(UP + "lora_A.weight", 4, 4, 1, 1), "no float matrix"),
    "twice": (
        edit_tensors(lambda t: t.update({f"base_model.model.x{infix}.weight": torch.ones(2) for infix in ("", ".base_layer")})),
        "holds a tensor twice",
    ),
    "partner": (edit_tensors(lambda tensors: tensors.pop(UP + "lora_B.weight")), "without its partner"),
    "empty": (edit_tensors(lambda tensors: tensors.clear()), "is empty"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_exact_is_refused_by_name(tiny_base: Path, make_adapter: AdapterFactory, damage: str) -> None:
    path = make_adapter(tiny_base, 1)
    harm, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(MismatchError, match=message):
        read_adapter(path)


def test_every_new_tensor_is_searched_for_nan(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "trainable_token_indices": {"lm_head": [1]}}
    path = make_adapter(tiny_base, 1, modules_to_save=["norm"], **options)
    before = load_file(path / WEIGHTS)
    read_adapter(path)
    assert {key.rpartition(".")[2] for key in before} >= {"lora_embedding_A", "lora_magnitude_vector", "trainable_tokens_delta"}
    for key in before:
        save_file(before | {key: torch.full_like(before[key], float("nan"))}, path / WEIGHTS)
        with pytest.raises(MismatchError, match=re.escape(f"{key} holds NaN")):
            read_adapter(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "q_proj has the magnitudes of DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight has a tensor saved whole"),
        ({"trainable_token_indices": [1]}, r"embed_tokens has replaced rows"),
        ({"lora_bias": True}, "q_proj has a LoRA bias"),
    ],
)
def test_a_sum_of_loras_cannot_say_everything(
    tiny_base: Path, make_adapter: AdapterFactory, options: dict[str, Any], message: str
) -> None:
    adapter = read_adapter(make_adapter(tiny_base, 1, target_modules=["q_proj"], **options))
    with pytest.raises(MismatchError, match=message):
        concatenate([adapter], [1.0])


def test_embeddings_add_up_as_loras(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    paths = [make_adapter(tiny_base, seed, r=seed, target_modules=["embed_tokens", "q_proj"]) for seed in (1, 2)]
    for path in paths:
        edit_tensors(lambda tensors: tensors.pop("base_model.model.model.embed_tokens.base_layer.weight"))(path)
    adapters = [read_adapter(path) for path in paths]
    save_adapter(tmp_path / "sum", *concatenate(adapters, (0.5, -2.0)))
    one, two, total = (own_deltas(adapter) for adapter in (*adapters, read_adapter(tmp_path / "sum")))
    assert_same(total, {name: 0.5 * one[name] - 2.0 * two[name] for name in one})
    assert_same(total, peft_deltas(tiny_base, tmp_path / "sum"))


def test_what_is_absent_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_adapter(tmp_path / "absent")
    with pytest.raises(NotFoundError, match="has no adapter_config"):
        read_adapter(tmp_path)
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE"):
        read_adapter("some-org/some-adapter@main")


def test_hash_follows_the_tensors_alone(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    first, same, other = (make_adapter(tiny_base, seed) for seed in (1, 1, 2))
    edit_config(lora_dropout=0.5)(same)
    hashes = [read_adapter(path).content_hash for path in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
