"""Rows, recipes and trainers for the tests of training: tiny, from a seed, in the words of conftest's tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from conftest import WORDS
from safetensors.torch import load_file
from torch import Tensor

from paft.models import load_model, load_tokenizer

Rows = list[dict[str, Any]]


def sft_rows(count: int, *, chat: bool = False, seed: int = 0, answer: int | None = 3) -> Rows:
    """Random prompts, answers of ``answer`` words (None: one to five)."""
    draw = random.Random(seed)
    rows = [
        {"prompt": words(draw, draw.randint(2, 7)), "completion": " " + words(draw, answer or draw.randint(1, 5))}
        for _ in range(count)
    ]
    return [as_chat(row) for row in rows] if chat else rows


def pref_rows(count: int, *, chat: bool = False, seed: int = 0) -> Rows:
    draw = random.Random(seed)
    rows = [
        {
            "prompt": words(draw, draw.randint(2, 7)),
            "chosen": " yes " + words(draw, draw.randint(1, 4)),
            "rejected": " no " + words(draw, draw.randint(1, 4)),
        }
        for _ in range(count)
    ]
    return [as_chat(row) for row in rows] if chat else rows


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"prompt": "user"}
    return {key: [{"role": roles.get(key, "assistant"), "content": text.strip()}] for key, text in row.items()}


def parts(base: Path) -> tuple[Any, Any]:
    return load_model(str(base)), load_tokenizer(str(base))


def factors(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def saved(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any entry."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def start_away_from_zero(trainer: Any) -> Any:
    """B = 0 has no L1 gradient, and no margin; random factors have both everywhere."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return trainer
