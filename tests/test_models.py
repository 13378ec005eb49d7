"""A base and its tokenizer: what would go wrong silently later is refused when it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file
from variantkit import make

from paft.errors import MismatchError, NotFoundError, PaftError
from paft.models import load_model, load_tokenizer, parameters, resolve_base, wrap


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def lose_a_tensor(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def cut(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def only_a_pickle(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (lose_a_tensor, MismatchError, "model.layers.1.mlp.up_proj.weight"),
        (cut, MismatchError, "not a complete safetensors file"),
        (only_a_pickle, NotFoundError, "cannot load"),
        (no_config, NotFoundError, "no config.json"),
    ],
)
def test_a_spoilt_base_is_refused(spoil: Callable[[Path], None], kind: type[PaftError], said: str, base: Path) -> None:
    load_model(str(base))
    spoil(base)
    with pytest.raises(kind) as caught:
        load_model(str(base))
    assert said in caught.value.message and "\n" not in caught.value.message


def edit_tokenizer(base: Path, **changed: str | None) -> None:
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_tokenizer_without_eos_or_template_is_refused_and_pad_is_filled_in(base: Path) -> None:
    edit_tokenizer(base, pad_token=None)
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "right"
    edit_tokenizer(base, chat_template=None)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    assert load_tokenizer(str(base), chat=False).chat_template is None
    with pytest.raises(MismatchError, match="no chat template"):
        load_tokenizer(str(base))
    edit_tokenizer(base, eos_token=None)
    with pytest.raises(MismatchError, match="no eos token"):
        load_tokenizer(str(base), chat=False)


def test_a_tied_head_is_not_a_missing_tensor(tiny_tied_base: Path) -> None:
    model = load_model(str(tiny_tied_base))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert parameters(tiny_tied_base) == sum(parameter.numel() for parameter in model.parameters())


def test_a_base_with_an_adapter_folded_in_computes_what_peft_does(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    adapter = make_adapter(tiny_base, 1)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        folded = load_model(str(tiny_base), on=str(adapter)).to("cpu")(input_ids=ids).logits
        wrapped = wrap(load_model(str(tiny_base)), adapter).to("cpu")(input_ids=ids).logits
        plain = load_model(str(tiny_base)).to("cpu")(input_ids=ids).logits
    torch.testing.assert_close(folded, wrapped, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(folded, plain, atol=1e-3)


def test_bases_and_adapters_are_not_mistaken_for_each_other(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    adapter = make_adapter(tiny_base, 1)
    with pytest.raises(MismatchError, match="is an adapter"):
        resolve_base(str(adapter))
    with pytest.raises(NotFoundError, match="is no adapter"):
        wrap(load_model(str(tiny_base)), tiny_base)


def test_an_adapter_with_a_missing_factor_is_refused(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    """PEFT would only warn and go on with a random factor."""
    adapter = shutil.copytree(make_adapter(tiny_base, 1), tmp_path / "part")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="does not fit"):
        wrap(load_model(str(tiny_base)), adapter)


FOLDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [3]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("variant", FOLDS)
def test_variants_are_folded_in_as_peft_computes_them(tiny_base: Path, tmp_path: Path, variant: str) -> None:
    adapter, ids = make(tiny_base, tmp_path / "adapter", **FOLDS[variant]), torch.arange(8)[None]
    with torch.no_grad():
        folded = load_model(str(tiny_base), on=str(adapter)).to("cpu")(input_ids=ids).logits
        unfolded = wrap(load_model(str(tiny_base)), adapter).to("cpu")(input_ids=ids).logits
    torch.testing.assert_close(folded, unfolded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": {"lm_head": [1]}},
    ],
)
def test_a_change_of_tied_embeddings_is_not_folded_in(tiny_tied_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """PEFT would let it leak from one into the other, or add it twice."""
    adapter = make(tiny_tied_base, tmp_path / "adapter", **options)
    with pytest.raises(MismatchError, match="are tied"):
        load_model(str(tiny_tied_base), on=str(adapter))


def test_replaced_rows_of_tied_embeddings_are_folded_in(tiny_tied_base: Path, tmp_path: Path) -> None:
    adapter = make(tiny_tied_base, tmp_path / "adapter", trainable_token_indices=[1])
    folded = load_model(str(tiny_tied_base), on=str(adapter))
    assert folded.get_output_embeddings().weight is folded.get_input_embeddings().weight


def test_a_lora_bias_without_a_bias_is_not_folded_in(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make(tiny_base, tmp_path / "adapter", lora_bias=True)
    with pytest.raises(MismatchError, match=r"cannot be folded into its base: .*no bias"):
        load_model(str(tiny_base), on=str(adapter))
