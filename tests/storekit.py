"""A base in shards, and what a merge of it must give wherever its files lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paft.store import Bucket
from paft.store.artefacts import LIST

Reads = list[tuple[str, int, int]]
FULL = ["--method", "ties", "-p", "density=0.5"]


def save_sharded(tiny_base: Path, base: Path) -> Path:
    """The tiny base in four files or more, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base, max_shard_size="25KB")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) >= 4
    return base


def watch(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Every range that is read behind a URL from now on: (file, start, stop)."""
    found: Reads = []
    real = Bucket.read

    def read(self: Bucket, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = real(self, name, start, stop)
        found.append((name, start, start + len(data)))
        return data

    monkeypatch.setattr(Bucket, "read", read)
    return found


def files_of(out: Path) -> dict[str, bytes]:
    left_out = ("paft.json", LIST, "README.md")  # they name the inputs, and when
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.name not in left_out}


def manifest(out: Path) -> dict[str, Any]:
    said = json.loads((out / "paft.json").read_text())
    return {key: said[key] for key in ("content_sha256", "tensors", "files")} | {"base": said["base"]["content_sha256"]}
