"""Regular expressions from an adapter's configuration: PEFT's own matching, with an end to what a stranger's pattern may cost.

`re` knows no time limit: ``(?:[a-z.]+)+!`` on the name of a module takes longer than the age of the universe.
"""

from __future__ import annotations

import regex

from paft.errors import MismatchError

SECONDS = 0.1  # of the processor; a sane pattern takes a millionth
_LONGEST = 10_000  # characters; PEFT's users list a model's layers in one pattern


def matches(pattern: str, name: str, *, tail: bool = False) -> bool:
    """Does ``pattern`` match all of ``name``, or with ``tail`` a part of it after a dot, up to its end?

    Raises MismatchError for what is no regular expression, or takes longer than `SECONDS`.
    """
    if len(pattern) > _LONGEST:
        raise MismatchError(f"a pattern of {len(pattern)} characters is no name of modules: {pattern[:60]!r}...")
    try:
        return regex.fullmatch(rf"(?:.*\.)?(?:{pattern})" if tail else pattern, name, timeout=SECONDS) is not None
    except regex.error as error:
        raise MismatchError(f"{pattern[:60]!r} is no regular expression: {error}") from error
    except (TimeoutError, RecursionError, MemoryError, OverflowError) as error:
        raise MismatchError(f"the pattern {pattern[:60]!r} takes too long to match", hint="name the modules instead") from error
