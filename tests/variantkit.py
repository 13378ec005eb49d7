"""Tiny bases of many architectures, adapters of every variant with random content, and PEFT's own answer in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from paft.adapter import CONFIG, WEIGHTS, read_adapter
from paft.checkpoint import Checkpoint
from paft.delta import LoraDelta, spans

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "gemma2": SMALL | {"head_dim": 8},
    "gemma3_text": SMALL | {"head_dim": 8},
    "mixtral": SMALL | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": SMALL
    | {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "gpt_neox": {key: SMALL[key] for key in SMALL if key != "num_key_value_heads"},
    "gpt2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
}


def save_model(
    path: Path, kind: str, *, tied: bool = False, dtype: torch.dtype = torch.float32, shard: str | None = None
) -> Path:
    """A random model of an architecture; ``shard`` is the largest size of a file, such as "20KB"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind], tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():  # biases start at zero and norms at one
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
            elif "experts" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def make(base: Path, path: Path, seed: int = 1, **options: Any) -> Path:
    """A PEFT LoRA on ``base`` with random content in all that is trained."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"], **options})
        model = get_peft_model(load(base), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad or "lora_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(path)
    return path


def wrapped(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The adapter on its base in PEFT, not merged."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base), adapter).to(dtype).eval()


def peft_deltas(base: Path, adapter: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """W' - W of PEFT's `merge_and_unload` in float64, by the names that the model's files use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped(base, adapter, torch.float64).merge_and_unload().save_pretrained(scratch)
    before = tensors_of(base)
    return {name: tensor - before[name].double() for name, tensor in tensors_of(scratch).items()}


def own_deltas(base: Path, adapter: Path, elements: int = 1 << 18) -> dict[str, torch.Tensor]:
    """Our ΔW, by the base's names and in its shapes."""
    delta = LoraDelta(read_adapter(adapter), Checkpoint.open(base))
    found = {}
    for name in delta.names:
        tensor = delta.tensor(name, elements)
        found[name] = torch.cat([tensor.tile(start, stop) for start, stop in spans(tensor)]).view(delta.shape(name))
    return found


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_exact(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Every tensor that changes is there, and ‖got - want‖ ≤ tolerance·‖want‖."""
    assert {name for name, tensor in want.items() if tensor.any()} == set(got)
    for name, tensor in got.items():
        assert float((tensor.double() - want[name]).norm()) <= tolerance * float(want[name].norm()), name


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of an adapter, named by the end of their keys with _ for every dot."""
    tensors = load_file(path / WEIGHTS)
    for ending, tensor in changes.items():
        keys = [key for key in tensors if key.replace(".", "_").endswith(ending)]
        for key in keys:
            del tensors[key]
            if tensor is not None:
                tensors[key] = tensor
    save_file(tensors, path / WEIGHTS)
