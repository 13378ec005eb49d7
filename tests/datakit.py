"""Small data sets in the words of the tiny tokenizer, written as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from conftest import WORDS

Row = dict[str, Any]
NOUNS, COLOURS = "cat dog bird fish".split(), "red blue green black big small hot cold".split()


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def chat_rows(count: int) -> list[Row]:
    """``count`` conversations of one turn each, all prompts distinct."""
    asked = [f"is the {noun} {colour} {word}" for noun, colour, word in product(NOUNS, COLOURS, WORDS[:8])]
    return [{"messages": [user(text), assistant("yes" if i % 2 else "no")]} for i, text in enumerate(asked[:count])]


def pair_rows(count: int) -> list[Row]:
    """``count`` preference pairs with explicit prompts, all prompts distinct."""
    asked = [f"what {word} are {colour} {noun}" for word, colour, noun in product(WORDS[:8], COLOURS, NOUNS)]
    return [{"prompt": [user(text)], "chosen": [assistant("hello please thanks")], "rejected": [assistant("no")]}
            for text in asked[:count]]


def write_jsonl(file: Path, rows: Iterable[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
