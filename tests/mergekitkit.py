"""A base of four layers, adapters on it, and mergekit itself, folding in float32 through a fresh cache."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import make_tokenizer
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def save_deep(path: Path, seed: int = 0, layers: int = 4) -> Path:
    """A random Llama of four narrow layers; with another seed, a model of the same shape with other weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


class Workshop:
    """A folder with ``base``, adapters ``a`` and ``b`` (the head is adapted too), and full models ``m`` and ``n``."""

    def __init__(self, folder: Path, make_adapter: Callable[..., Path]) -> None:
        self.folder, self.runs = folder, 0
        self.base = save_deep(folder / "base")
        targets = ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
        for name, seed in (("a", 1), ("b", 2)):
            make_adapter(self.base, seed, target_modules=targets).rename(folder / name)
        for name, seed in (("m", 3), ("n", 4)):
            save_deep(folder / name, seed)

    def file(self, text: str, name: str = "merge.yml") -> Path:
        """A YAML file in which ``@base``, ``@a``, ... are the paths of what lies here."""
        for one in ("base", "a", "b", "m", "n"):
            text = text.replace(f"@{one}", str(self.folder / one))
        file = self.folder / name
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    def mergekit(self, file: Path, seed: int | None = None) -> Tensors:
        """What mergekit makes of a file."""
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        self.runs += 1
        out = self.folder / f"mergekit-{self.runs}"
        options = MergeOptions(lora_merge_cache=str(out) + "-cache", lora_merge_dtype="float32", copy_tokenizer=False,
                               write_model_card=False, quiet=True, random_seed=seed)
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(file.read_text())), str(out), options)
        return tensors(out)

    def paft(self, file: Path, *more: str) -> Tensors:
        """What the command line makes of it."""
        from paft.cli import invoke

        self.runs += 1
        out = self.folder / f"paft-{self.runs}"
        assert invoke(["merge", "-c", str(file), "-o", str(out), "-q", *more]) == 0
        return tensors(out)


def tensors(path: Path) -> Tensors:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def distance(one: Tensors, other: Tensors) -> float:
    """The largest difference of any entry, in float64; the names and types must be the same."""
    assert one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in one)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def document(file: Path) -> Any:
    return yaml.safe_load(file.read_text())
