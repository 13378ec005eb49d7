"""Tied embedding and head: what changes both alike is exact, what changes one of them is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from variantkit import assert_exact, edit_tensors, load, make, own_deltas, peft_deltas, save_model, tensors_of, wrapped

from paft.adapter import WEIGHTS, read_adapter
from paft.checkpoint import SINGLE, Checkpoint
from paft.delta import LoraDelta
from paft.errors import MismatchError
from paft.merge.engine import merge

TOKENS = torch.arange(12).view(1, 12)
EMBED = "model.embed_tokens.weight"
Bases = dict[str, Path]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Tied bases, and one whose file holds a second copy of the tied tensor."""
    folder = tmp_path_factory.mktemp("tied")
    found = {kind: save_model(folder / kind, kind, tied=True) for kind in ("llama", "gpt2", "gemma3_text", "gpt_neox")}
    found["twice"] = save_model(folder / "twice", "llama", tied=True)
    tensors = tensors_of(found["twice"])
    save_file(tensors | {"lm_head.weight": tensors[EMBED].clone()}, found["twice"] / SINGLE, metadata={"format": "pt"})
    return found


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    options = {"method": "task_arithmetic", "parameters": {}, "weights": None, **options}
    merge([str(adapter)], base=str(base), out=out, **options)
    return out


BOTH: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [1, 7]},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": [1, 7], "lm_head": [1, 7]}},
    "saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved-from-head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "lora": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "lora-from-head": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", ["llama", "twice", "gemma3_text"])
@pytest.mark.parametrize("case", BOTH)
def test_a_change_of_both_is_exact(bases: Bases, tmp_path: Path, case: str, kind: str) -> None:
    """The oracle is the adapter before merging: `merge_and_unload` adds a tied product twice."""
    adapter = make(bases[kind], tmp_path / "adapter", **BOTH[case])
    out = merged(bases[kind], adapter, tmp_path / "out")
    model, want = load(out), wrapped(bases[kind], adapter)(TOKENS).logits
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.allclose(model(TOKENS).logits, want, atol=1e-4)
    assert not torch.allclose(load(bases[kind])(TOKENS).logits, want, atol=1e-2)


@pytest.mark.parametrize("case", ["tokens", "saved"])
def test_a_change_of_both_is_what_peft_merges(bases: Bases, tmp_path: Path, case: str) -> None:
    adapter = make(bases["llama"], tmp_path / "adapter", **BOTH[case])
    assert_exact(own_deltas(bases["llama"], adapter), peft_deltas(bases["llama"], adapter, tmp_path / "merged"))


def test_peft_adds_a_tied_product_twice(bases: Bases, tmp_path: Path) -> None:
    """Why the oracle above is not `merge_and_unload`. When this fails PEFT has mended it."""
    adapter = make(bases["llama"], tmp_path / "adapter", **BOTH["lora"])
    got, peft = own_deltas(bases["llama"], adapter)[EMBED], peft_deltas(bases["llama"], adapter, tmp_path / "m")[EMBED]
    assert torch.allclose(2 * got.double(), peft, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_two_copies_of_a_tied_tensor_stay_alike(bases: Bases, tmp_path: Path, method: str) -> None:
    adapter = make(bases["twice"], tmp_path / "adapter", **BOTH["lora"])
    out = merged(bases["twice"], adapter, tmp_path / "out", method=method, parameters={"density": 0.5})
    tensors = load_file(out / SINGLE)
    assert torch.equal(tensors["lm_head.weight"], tensors[EMBED])


ONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}, r"model\.embed_tokens is tied to lm_head .* alone"),
    "head": ("llama", {"target_modules": ["lm_head"]}, r"lm_head is tied to model\.embed_tokens .* alone"),
    "twice": ("twice", {"target_modules": ["lm_head"]}, r"lm_head is tied to model\.embed_tokens .* alone"),
    "both-apart": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}, "otherwise"),
    "saved-embedding": ("llama", {"modules_to_save": ["embed_tokens"]}, "alone"),
    "saved-head": ("gemma3_text", {"modules_to_save": ["lm_head"]}, r"lm_head is tied to model\.embed_tokens"),
    "saved-apart": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, "otherwise"),
    "tokens-of-head": ("llama", {"trainable_token_indices": {"lm_head": [1]}}, "alone"),
    "tokens-apart": ("llama", {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "otherwise"),
    "gpt2": ("gpt2", {"target_modules": ["wte"]}, r"transformer\.wte is tied to lm_head"),
    "gpt2-head": ("gpt2", {"target_modules": ["lm_head"]}, r"lm_head is tied to transformer\.wte"),
    "neox": ("gpt_neox", {"target_modules": ["embed_in"]}, r"gpt_neox\.embed_in is tied to lm_head"),
    "dora": ("llama", {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}, "otherwise"),
}


@pytest.mark.parametrize("case", ONE)
def test_a_change_of_one_is_refused_by_name(bases: Bases, tmp_path: Path, case: str) -> None:
    kind, options, message = ONE[case]
    adapter = make(bases[kind], tmp_path / "adapter", **options)
    with pytest.raises(MismatchError, match=message) as caught:
        LoraDelta(read_adapter(adapter), Checkpoint.open(bases[kind]))
    assert "ensure_weight_tying" in (caught.value.hint or "")


def test_position_embeddings_are_tied_to_nothing(bases: Bases, tmp_path: Path) -> None:
    adapter = make(bases["gpt2"], tmp_path / "adapter", target_modules=["wpe"])
    assert_exact(own_deltas(bases["gpt2"], adapter), peft_deltas(bases["gpt2"], adapter, tmp_path / "merged"))


def test_copies_of_a_tied_tensor_change_nothing(bases: Bases, tmp_path: Path) -> None:
    """PEFT stores the head's base weight when the head is a target, also where the base stores the embedding alone."""
    adapter = make(bases["llama"], tmp_path / "adapter")
    own = tensors_of(bases["llama"])[EMBED]
    copies = {f"base_model.model.{name}.weight": own.clone() for name in ("lm_head.base_layer", "model.embed_tokens")}
    save_file(load_file(adapter / WEIGHTS) | copies, adapter / WEIGHTS)
    delta = LoraDelta(read_adapter(adapter), Checkpoint.open(bases["llama"]))
    assert all("q_proj" in name or "up_proj" in name for name in delta.names)
    edit_tensors(adapter, lm_head_base_layer_weight=None)
    edit_tensors(adapter, embed_tokens_weight=None)
    assert delta.names == LoraDelta(read_adapter(adapter), Checkpoint.open(bases["llama"])).names


def test_a_base_that_holds_two_different_copies_is_not_tied(bases: Bases, tmp_path: Path) -> None:
    """transformers 5 does not tie them either, whatever the configuration says."""
    base = save_model(tmp_path / "base", "llama", tied=True)
    tensors = tensors_of(base)
    save_file(tensors | {"lm_head.weight": tensors[EMBED] + 0.1}, base / SINGLE, metadata={"format": "pt"})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    adapter = make(base, tmp_path / "adapter", target_modules=["lm_head"])
    out = merged(base, adapter, tmp_path / "out")
    assert torch.allclose(load(out)(TOKENS).logits, wrapped(base, adapter)(TOKENS).logits, atol=1e-4)


@pytest.mark.parametrize(("tuned", "base"), [("llama", "twice"), ("twice", "llama")])
def test_a_full_model_may_store_a_tied_head_again(bases: Bases, tmp_path: Path, tuned: str, base: str) -> None:
    model = load(bases[tuned])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    model.save_pretrained(tmp_path / "tuned")
    if tuned == "twice":
        tensors = tensors_of(tmp_path / "tuned")
        save_file(tensors | {"lm_head.weight": tensors[EMBED].clone()}, tmp_path / "tuned" / SINGLE, metadata={"format": "pt"})
    out = merged(bases[base], tmp_path / "tuned", tmp_path / "out")
    assert torch.allclose(load(out)(TOKENS).logits, model(TOKENS).logits, atol=1e-4)
    if tuned == "twice":  # two heads are no longer one
        save_file(tensors | {"lm_head.weight": tensors[EMBED] + 1}, tmp_path / "tuned" / SINGLE, metadata={"format": "pt"})
        with pytest.raises(MismatchError, match=r"llama has no tensor lm_head\.weight"):
            merged(bases[base], tmp_path / "tuned", tmp_path / "again")


def test_a_full_model_may_have_another_prefix(bases: Bases, tmp_path: Path) -> None:
    """The hub's gpt2 stores h.0..., and transformers saves transformer.h.0...."""
    model = load(bases["gpt2"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    model.save_pretrained(tmp_path / "tuned")
    base = save_model(tmp_path / "base", "gpt2", tied=True)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(base).items()}
    save_file(short, base / SINGLE, metadata={"format": "pt"})
    out = merged(base, tmp_path / "tuned", tmp_path / "out")
    assert tensors_of(out).keys() == short.keys()
    assert torch.allclose(load(out)(TOKENS).logits, model(TOKENS).logits, atol=1e-4)
