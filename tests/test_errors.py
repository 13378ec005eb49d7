"""The error tree: every leaf has its own exit code, and a misspelt word finds its neighbour."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paft import errors
from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError, UsageError, did_you_mean


def test_exit_codes_are_those_of_the_manual() -> None:
    codes = {PaftError: 1, UsageError: 2, MismatchError: 3, NotFoundError: 4, ResourceError: 5}
    assert {kind: kind.exit_code for kind in codes} == codes
    leaves = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PaftError)}
    assert leaves == set(codes)


def test_an_error_carries_message_and_hint() -> None:
    error = MismatchError("the cause", hint="the remedy")
    assert (str(error), error.message, error.hint) == ("the cause", "the cause", "the remedy")
    assert UsageError("the cause").hint is None


@given(st.sampled_from(["density", "weight", "lambda", "normalize"]), st.data())
def test_one_lost_letter_is_found_again(word: str, data: st.DataObject) -> None:
    gone = data.draw(st.integers(0, len(word) - 1))
    misspelt = word[:gone] + word[gone + 1 :]
    assert did_you_mean(misspelt, ["density", "weight", "lambda", "normalize"]) == f"did you mean {word!r}?"


@pytest.mark.parametrize("known", [["b", "a"], {"a": 1, "b": 2}])
def test_nothing_close_lists_what_is_known(known: object) -> None:
    assert did_you_mean("zzzz", known) == "known: a, b"  # type: ignore[arg-type]
