"""What can go wrong, as a tree; each leaf knows its exit code and carries a hint.

    PaftError              1  a bug, or something nobody foresaw
    ├── UsageError         2  the command line or a recipe is wrong
    ├── MismatchError      3  the inputs do not fit together (base, shapes, NaN, a target that is not empty)
    ├── NotFoundError      4  a file, model or data set is missing, offline or forbidden
    └── ResourceError      5  the environment: disk full, no GPU, a missing extra

A message is one line that names the cause; `hint` is one line that names the remedy. Nothing in here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any

_LONGEST = 600


class PaftError(Exception):
    """Base of all errors that paft raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = one_line(message)
        super().__init__(message)
        self.message = message
        self.hint = hint and one_line(hint)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the hint: an error in a worker process is the user's error too."""
        return partial(type(self), hint=self.hint), (self.message,)


class UsageError(PaftError):
    """The command line or a recipe is wrong."""

    exit_code = 2


class MismatchError(PaftError):
    """The inputs are readable but do not fit together, or an output would overwrite something."""

    exit_code = 3


class NotFoundError(PaftError):
    """A file, model or data set does not exist or cannot be reached."""

    exit_code = 4


class ResourceError(PaftError):
    """The machine lacks something: disk, memory, a device, an optional package."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Did the allocator of the machine or of a GPU refuse? By name and text: importing torch's classes would cost a second."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """The beginning of what a library's error says, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:200]


def one_line(text: str) -> str:
    """``text`` without line breaks, escape codes or an end out of sight: what it quotes may be a stranger's."""
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))[:_LONGEST]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` or a list of what is known.

    >>> did_you_mean("densty", ["density", "weight"])
    "did you mean 'density'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
