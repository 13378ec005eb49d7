"""A place to run commands in, and what a refusal must look like."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

Capture = pytest.CaptureFixture[str]


class World:
    """A directory to work in: a tiny base, two adapters that fit it, and small data."""

    def __init__(self, base: Path, make_adapter: AdapterFactory, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.one, self.two = make_adapter(base, 1), make_adapter(base, 2)
        self.chat = write_jsonl(folder / "chat.jsonl", chat_rows(24))
        self.pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
        self.out = folder / "out"

    def train(self, *more: str) -> list[str]:
        return ["train-sft", "-m", str(self.base), "-d", str(self.chat), "-o", str(self.out),
                "--set", "trainer.max_steps=2", *more]

    def merge(self, *more: str) -> list[str]:
        return ["merge", str(self.one), str(self.two), "-o", str(self.out), *more]


def assert_one_error(capsys: Capture, code: int, expected: int, said: str) -> None:
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert code == expected, err
    assert out == "" and "Traceback" not in err
    assert len(lines) in (1, 2) and lines[0].startswith("error: ") and said in lines[0], err
    assert all(line.startswith("  try: ") for line in lines[1:])
