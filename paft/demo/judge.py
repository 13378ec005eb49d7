"""Score a generated answer by program. Nothing here needs torch.

The parts of style are scored apart, because one judge of all three at once flips from 0 to 1 between two nearby models.
"""

from __future__ import annotations

from paft.demo.world import CLOSERS, COLOURS, FACTS, NOUNS, OPENERS, PLACES, TASKS, Row

SPECIAL = ("<eos>", "<pad>")


def _words(text: str) -> list[str]:
    """The words of a text without end and padding tokens."""
    return [word for word in text.split() if word not in SPECIAL]


def exact_match(prediction: str, row: Row) -> bool:
    """Whether the prediction is the completion of an SFT row, word for word; ``<eos>`` and white space do not count."""
    return _words(prediction) == _words(row["completion"][0]["content"])


def _question(row: Row) -> tuple[str, str]:
    """The attribute (colour or place) and the noun that a preference row asks about; ValueError for another prompt."""
    asked = row["prompt"][-1]["content"]
    for attribute in ("colour", "place"):
        for ask in TASKS[attribute].ask:
            before, after = ask.split("{x}")
            noun = asked.removeprefix(before).removesuffix(after)
            if noun in NOUNS and asked == before + noun + after:
                return attribute, noun
    raise ValueError(f"not a question about colour or place: {asked!r}")


def style(prediction: str, row: Row) -> dict[str, bool]:
    """Score the answer to a preference row's prompt.

    ``opener``: it begins with one of the polite openers. ``closer``: it ends with one of the polite closers. ``fact``:
    of the asked attribute it names the true value and no other, and it names no other noun; a bare true answer passes.
    Raises ValueError if the row asks about neither colour nor place.
    """
    attribute, noun = _question(row)
    words = _words(prediction)
    values = set(words) & set(COLOURS if attribute == "colour" else PLACES)
    text = " ".join(words)
    return {
        "opener": any(f"{text} ".startswith(f"{opener} ") for opener in OPENERS),
        "fact": values == {FACTS[attribute][noun]} and set(words) & set(NOUNS) <= {noun},
        "closer": any(f" {text}".endswith(f" {closer}") for closer in CLOSERS),
    }
