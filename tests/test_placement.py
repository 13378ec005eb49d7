"""What an adapter holds and its base: the place of every tensor, and a refusal by name where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from variantkit import assert_exact, edit_config, edit_tensors, make, own_deltas, peft_deltas, save_model, tensors_of

from paft.adapter import WEIGHTS, read_adapter
from paft.checkpoint import SINGLE, Checkpoint
from paft.delta import LoraDelta
from paft.errors import MismatchError

Harm = Callable[[Path, Path], object]
KINDS = ("llama", "qwen2", "mixtral", "gpt2")
PRE = "base_model.model."


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_model(folder / kind, kind) for kind in KINDS}


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Harm:
    def harm(adapter: Path, base: Path) -> None:
        save_file(load_file(adapter / WEIGHTS) | {name: torch.ones(shape, dtype=dtype)}, adapter / WEIGHTS)

    return harm


def drop(name: str) -> Harm:
    def harm(adapter: Path, base: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        del tensors[name]
        save_file(tensors, adapter / WEIGHTS)

    return harm


def tokens(*rows: int, width: int = 32) -> Harm:
    def harm(adapter: Path, base: Path) -> None:
        edit_config(adapter, trainable_token_indices=list(rows))
        add(PRE + "model.embed_tokens.token_adapter.trainable_tokens_delta", len(rows), width)(adapter, base)

    return harm


def zero_row(adapter: Path, base: Path) -> None:
    tensors = load_file(base / SINGLE)
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0
    save_file(tensors, base / SINGLE)
    key = PRE + "model.layers.0.self_attn.q_proj.lora_B.weight"
    factors = load_file(adapter / WEIGHTS)
    factors[key][3] = 0
    save_file(factors, adapter / WEIGHTS)


def no_change(adapter: Path, base: Path) -> None:
    save_file({PRE + "lm_head.weight": tensors_of(base)["lm_head.weight"]}, adapter / WEIGHTS)


def fewer_experts(adapter: Path, base: Path) -> None:
    key = PRE + "model.layers.0.mlp.experts."
    add(key + "lora_A.weight", 6, 32)(adapter, base)
    add(key + "lora_B.weight", 96, 6)(adapter, base)


SAVES = {"modules_to_save": ["lm_head"]}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}
REFUSED: dict[str, tuple[str, dict[str, Any], Harm, str, str]] = {
    "lora-bias": ("llama", {"lora_bias": True}, lambda a, b: None, r"no tensor model\.layers\.0.*_proj\.bias", "lora_bias"),
    "bias": ("llama", {"bias": "all"}, add(PRE + "model.norm.bias", 32), r"no tensor model\.norm\.bias", "lacks"),
    "head-module": ("llama", {"modules_to_save": ["score"]}, add(PRE + "score.weight", 2, 32), r"score\.weight", "lacks"),
    "resized": ("llama", SAVES, add(PRE + "lm_head.weight", 44, 32), r"lm_head\.weight is \[44, 32\].*\[40, 32\]", "vocabulary"),
    "resized-copy": ("llama", {}, add(PRE + "model.embed_tokens.weight", 44, 32), r"embed_tokens.*\[44, 32\]", "vocabulary"),
    "saved-shape": ("llama", SAVES, add(PRE + "lm_head.weight", 40, 33), r"lm_head\.weight is \[40, 33\]", "trained on"),
    "saved-integers": (
        "llama", SAVES, add(PRE + "lm_head.weight", 40, 32, dtype=torch.int8), r"lm_head\.weight \(I8\)", ""),
    "not-saved": ("llama", SAVES, drop(PRE + "lm_head.weight"), r"lacks lm_head\.weight, which its modules", "incomplete"),
    "undeclared": ("llama", {}, add(PRE + "model.norm.weight", 32), r"replaces model\.norm\.weight", "modules_to_save"),
    "row-outside": ("llama", {}, tokens(1, 40), r"row 40 of model\.embed_tokens\.weight, which has 40 rows", "vocabulary"),
    "row-negative": ("llama", {}, tokens(-1), "row -1 of", "vocabulary"),
    "row-width": ("llama", {}, tokens(1, width=31), r"\[40, 31\]", "trained on"),
    "row-and-lora": ("llama", {"target_modules": ["embed_tokens"]}, tokens(1), "do not add up", ""),
    "dora-and-saved": (
        "llama", {"target_modules": ["lm_head"], "use_dora": True},
        lambda a, b: edit_tensors(a, lm_head_base_layer_weight=torch.ones(40, 32)), "do not add up", ""),
    "dora-norm": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, zero_row, r"layers\.0\.self_attn\.q_proj", ""),
    "nothing": ("llama", {}, no_change, "is empty: nothing in it changes the base", ""),
    "experts": ("mixtral", EXPERTS, fewer_experts, r"experts\.gate_up_proj", ""),
    "wrong-model": ("gpt2", {"target_modules": ["c_attn"]}, add(PRE + "x.lora_A.weight", 3, 4), "x has lora_A without", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_name(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, options, harm, message, hint = REFUSED[case]
    base = tmp_path / "base"
    base.mkdir()
    for file in bases[kind].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    adapter = make(base, tmp_path / "adapter", **options)
    harm(adapter, base)
    with pytest.raises(MismatchError, match=message) as caught:
        delta = LoraDelta(read_adapter(adapter), Checkpoint.open(base))
        for name in delta.names:
            delta.tensor(name).tile(0, delta.tensor(name).rows)
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.message


def test_an_adapter_of_another_architecture_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make(bases["llama"], tmp_path / "adapter")
    with pytest.raises(MismatchError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        LoraDelta(read_adapter(adapter), Checkpoint.open(bases["gpt2"]))


def test_a_replaced_tensor_with_factors_on_it_is_a_sum(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT loads a stored base_layer over the base's and adds s·B·A to it."""
    adapter = make(bases["llama"], tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    other = tensors_of(bases["llama"])["lm_head.weight"] + 0.1
    edit_tensors(adapter, lm_head_base_layer_weight=other)
    assert_exact(own_deltas(bases["llama"], adapter), peft_deltas(bases["llama"], adapter, tmp_path / "merged"))
    delta = LoraDelta(read_adapter(adapter), Checkpoint.open(bases["llama"]))
    assert "lm_head.weight" in delta.names
    assert "lm_head.weight" not in delta.modules


def test_only_plain_products_have_a_module(bases: dict[str, Path], tmp_path: Path) -> None:
    """The others cannot be written as one LoRA."""
    options: list[dict[str, Any]] = [{"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [1]}]
    for number, option in enumerate(options):
        adapter = make(bases["qwen2"], tmp_path / str(number), target_modules=["q_proj"], **option)
        delta = LoraDelta(read_adapter(adapter), Checkpoint.open(bases["qwen2"]))
        plain = set() if "use_dora" in option else {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
        assert set(delta.modules) == plain
        assert set(delta.names) > plain
