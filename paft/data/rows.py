"""Sets of rows: their content hash, the cut into splits, and what two splits may not share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from paft.errors import MismatchError, UsageError

Row = dict[str, Any]
Note = Callable[[str], None]


class Stream(list[Row]):
    """The first rows of data that are read as they are trained on: checked like any others. ``source`` is the IterableDataset."""

    def __init__(self, head: list[Row], source: Any) -> None:
        super().__init__(head)
        self.source = source


def silent(_: str) -> None:
    """A `Note` for callers that want none."""


def row_key(row: Row) -> str:
    """A row's content as text, the same for any order of keys."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False)


def prompt_key(row: Row) -> str:
    """What a row asks; of a conversation all up to the first user turn, so that its unrolled turns stay together."""
    asked = row.get("prompt", row.get("text"))
    if isinstance(asked, list):
        first = next((i for i, turn in enumerate(asked) if turn["role"] == "user"), len(asked) - 1)
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in asked[: first + 1]]
    return json.dumps(asked, sort_keys=True, ensure_ascii=False)


def content_hash(rows: list[Row]) -> str:
    """sha256 of the rows in order, independent of file format; of a stream, marked as such, of its first rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_key(row).encode() + b"\n")
    return f"first {len(rows)} rows: {digest.hexdigest()}" if isinstance(rows, Stream) else digest.hexdigest()


def hold_out(rows: list[Row], fraction: float, salt: str = "") -> tuple[list[Row], list[Row]]:
    """(kept, held out): about ``fraction`` of the distinct prompts, by hash; the same rows whatever their order."""
    limit = int(fraction * 2**32)
    held = [int.from_bytes(hashlib.sha256((salt + prompt_key(row)).encode()).digest()[:4]) < limit for row in rows]
    kept = [row for row, out in zip(rows, held, strict=True) if not out]
    gone = [row for row, out in zip(rows, held, strict=True) if out]
    if fraction and (not kept or not gone):
        raise UsageError(f"{len(rows)} rows are too few to hold out {fraction:.0%}", hint="name validation and test data instead")
    return kept, gone


def check_leakage(found: dict[str, list[Row]], note: Note = silent) -> None:
    """Evaluation data is never training data: an identical row in two splits is a MismatchError.

    A prompt of the first split that another one asks again is told by ``note``: with preferences or several answers to a
    question that may be meant, but the held-out numbers then say less about new prompts.
    """
    seen: dict[str, str] = {}
    for name, rows in found.items():
        for key in {row_key(row) for row in rows}:
            if seen.setdefault(key, name) != name:
                raise MismatchError(f"the same row is in {seen[key]} and {name}: {key[:80]}...",
                                    hint="remove it from one of them")
    (_, first), *others = found.items()
    asked = {prompt_key(row) for row in first}
    for name, rows in others:
        if again := sum(prompt_key(row) in asked for row in rows):
            note(f"{again} of {len(rows)} rows of the {name} have a prompt that is trained on, with another answer")
