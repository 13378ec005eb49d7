"""Models and adapters of strangers: configs that lie, code, pickles, patterns without end, NaN. Each is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file

from paft import bounded
from paft.attach import wrap
from paft.errors import MismatchError, PaftError, UsageError
from paft.merge.engine import merge
from paft.models import load_model, load_tokenizer, skeleton
from paft.target import output_dir


def edited(source: Path, folder: Path, name: str, **changed: Any) -> Path:
    place = Path(shutil.copytree(source, folder / "edited"))
    config = json.loads((place / name).read_text()) | changed
    (place / name).write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("changed", [
    {"num_hidden_layers": 10**8}, {"num_attention_heads": 0}, {"num_attention_heads": "x"}, {"model_type": "nope"},
    {"hidden_act": "evil"}, {"rope_parameters": "x"}, {"max_position_embeddings": "x"}, {"dtype": "evil", "torch_dtype": "evil"},
    {"model_type": "nope", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
], ids=str)
def test_a_config_that_cannot_be_is_refused(changed: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    base = edited(tiny_base, tmp_path, "config.json", **changed)
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for opened in (skeleton, lambda path: load_model(str(path))):
        with pytest.raises(MismatchError) as caught:
            opened(base)
        assert "\n" not in caught.value.message and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{}", "[]", '{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "tokenizer_class": "T"}'])
def test_a_tokenizer_that_is_none_is_refused(name: str, text: str, tiny_base: Path, tmp_path: Path) -> None:
    base = edited(tiny_base, tmp_path, "config.json")
    (base / name).write_text(text)
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(PaftError) as caught:
        load_tokenizer(str(base))
    assert caught.value.exit_code in (3, 4) and not (tmp_path / "ran").exists()


def poisoned(file: Path, name: str, value: float) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(value: float, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    base = edited(tiny_base, tmp_path, "config.json")
    poisoned(base / "model.safetensors", "model.norm.weight", value)
    with pytest.raises(MismatchError, match=r"model\.norm\.weight of"):
        load_model(str(base))
    adapter = make_adapter(tiny_base, 1)
    poisoned(adapter / "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", value)
    with pytest.raises(MismatchError, match=r"up_proj\.lora_A\.default\.weight of"):
        wrap(load_model(str(tiny_base)), adapter)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"])  # copied, merged
def test_a_base_with_nan_is_not_merged_unseen(name: str, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    base = edited(tiny_base, tmp_path, "config.json")
    poisoned(base / "model.safetensors", name, float("nan"))
    pair = [str(make_adapter(tiny_base, seed)) for seed in (1, 2)]
    with pytest.raises(MismatchError, match=name):
        merge(pair, base=str(base), method="linear", parameters={}, weights=None, out=tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def as_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    (adapter / "adapter_model.safetensors").unlink()


def as_fifo(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("spoil", [as_pickle, as_fifo])
def test_peft_reads_safetensors_alone(spoil: Callable[[Path], None], tiny_base: Path, make_adapter: AdapterFactory,
                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(tiny_base, 1)
    spoil(adapter)
    with pytest.raises(PaftError) as caught:
        wrap(load_model(str(tiny_base)), adapter)
    assert caught.value.exit_code in (3, 4) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changed", [
    {"target_modules": r"(\w|\w|[a-z.]+)*[!?]"}, {"exclude_modules": r"(\w|\w|[a-z.]+)*[!?]"},
    {"rank_pattern": {r"(\w|\w|[a-z.]+)*[!?]": 4}}, {"peft_type": "EVIL"}, {"r": "x"}, {"r": 0}, {"target_modules": 7},
    {"rank_pattern": {"(": 4}}, {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, {"trainable_token_indices": [10**12]},
], ids=str)
def test_a_config_that_peft_would_trust_is_refused(changed: dict[str, Any], tiny_base: Path, make_adapter: AdapterFactory,
                                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    adapter = edited(make_adapter(tiny_base, 1), tmp_path, "adapter_config.json", **changed)
    with pytest.raises(MismatchError) as caught:
        wrap(load_model(str(tiny_base)), adapter)
    assert "\n" not in caught.value.message


def test_what_finds_no_memory_is_no_fault_of_the_adapter(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    from paft.errors import is_out_of_memory

    adapter = edited(make_adapter(tiny_base, 1), tmp_path, "adapter_config.json", r=10**9)
    with pytest.raises(RuntimeError) as caught:
        wrap(load_model(str(tiny_base)), adapter)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("x"))


def test_half_a_surrogate_pair_and_an_odd_seed_are_refused(tmp_path: Path) -> None:
    from paft.data.load import load_rows
    from paft.recipe import SftRecipe, validate

    (tmp_path / "rows.jsonl").write_text('{"text": "\\ud800"}\n{"text": "a"}\n')
    with pytest.raises(UsageError, match="surrogate"):
        load_rows(str(tmp_path / "rows.jsonl"), "sft")
    for seed in (-1, 1 << 32):
        with pytest.raises(UsageError, match="seed"):
            validate(SftRecipe, {"seed": seed})


def test_numbers_and_places_that_cannot_be_are_told_before_any_work(tiny_base: Path, tmp_path: Path) -> None:
    from paft.cli import invoke

    rows = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{}")
    assert invoke(["eval", str(tiny_base), "--pref-data", rows, "--beta", "nan"]) == 2
    assert invoke(["train-dpo", "-m", str(tiny_base), "-d", rows, "--beta", "inf", "-o", str(tmp_path / "out")]) == 2
    with pytest.raises(MismatchError, match="is a file"), output_dir(tmp_path / "rows.jsonl" / "out"):
        raise AssertionError("worked")
