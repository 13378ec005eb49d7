"""A rendered sample for people: what is trained on is marked, and coloured on a terminal."""

from __future__ import annotations

import os
import textwrap
from typing import Any

import click

WIDTH = 79


def sample_lines(found: dict[str, Any]) -> list[str]:
    """The samples of `paft.train.sample.show_sample` as lines of at most 80 columns.

    ``>`` begins a line that is trained on, ``↵`` ends one where the text breaks; other breaks are the display's.
    """
    lines: list[str] = []
    for sample in found["samples"]:
        cut = f" (cut from {sample['length']})" if sample["length"] > sample["tokens"] else ""
        lines += [""] if lines else []
        lines += [f"{sample['set']} row 1, {sample['part']}: {sample['tokens']} tokens{cut}, the loss counts "
                  f"{sample['trained']}: >"]
        for segment in sample["segments"]:
            on = segment["trained"]
            lines += [_styled(line, on) for line in _wrapped(segment["text"], "> " if on else "  ")]
    return lines


def _wrapped(text: str, mark: str) -> list[str]:
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    pieces = shown.replace("\n", "↵\n").removesuffix("\n").split("\n")
    return [mark + line for piece in pieces
            for line in textwrap.wrap(piece, WIDTH - len(mark), drop_whitespace=False, replace_whitespace=False) or [""]]


def _styled(line: str, trained: bool) -> str:
    """Colour where stdout is a terminal; click strips it elsewhere."""
    if os.environ.get("NO_COLOR"):
        return line
    return click.style(line, fg="green") if trained else click.style(line, dim=True)
