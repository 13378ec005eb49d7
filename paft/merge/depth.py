"""Where a tensor stands in its model: its layer, and how deep that is, read from the tensors' names.

    depth t = layer / (layers - 1)     0 in the first layer, 1 in the last

The layer is the first number that is a part of the name: 3 in ``model.layers.3.mlp.experts.7.w1.weight``. Stacks with
different prefixes (an encoder and a decoder) are counted apart. As in mergekit, the only layer of a stack has depth 1,
and a tensor outside the layers (embedding, final norm, head) has depth 0, also where it comes last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from paft.errors import UsageError, did_you_mean

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_HEADS = ("lm_head.weight", "embed_out.weight")  # a tied head is no tensor of the base, but no misspelling either


@dataclass(frozen=True)
class Depth:
    """The layers of a model: ``counts`` maps a stack's prefix, such as ``model.layers.``, to the number of its layers."""

    names: tuple[str, ...]
    counts: dict[str, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> Depth:
        """Count the layers in the names of a base's tensors."""
        names, counts = tuple(names), {}
        for name in names:
            prefix, layer = split(name)[:2]
            if layer is not None:
                counts[prefix] = max(counts.get(prefix, 0), layer + 1)
        return cls(names, counts)

    @property
    def layers(self) -> int:
        """The number of layers of the tallest stack, 0 where no name has a number."""
        return max(self.counts.values(), default=0)

    def place(self, name: str) -> tuple[int | None, float]:
        """(layer, t) of a tensor; (None, 0) outside the layers."""
        prefix, layer, _ = split(name)
        if layer is None:
            return None, 0.0
        last = self.counts.get(prefix, layer + 1) - 1
        return layer, layer / last if last else 1.0

    def check_filter(self, text: str) -> None:
        """UsageError where no tensor's name contains ``text``: a filter that never applies is a misspelling."""
        if not any(text in name for name in (*self.names, *_HEADS)):
            words = {word for name in self.names for word in name.split(".") if not word.isdigit()}
            raise UsageError(f"filter {text!r} is in no tensor's name of the base", hint=did_you_mean(text, words))

    def check_layers(self, first: int, last: int) -> None:
        """UsageError for layers that the base does not have."""
        if last >= self.layers:
            span = str(first) if first == last else f"{first}-{last}"
            has = f"layers 0 to {self.layers - 1}" if self.layers else "no numbered layers"
            raise UsageError(f"layers {span}: the base has {has}")


def split(name: str) -> tuple[str, int | None, str]:
    """``model.layers.3.mlp.up_proj.weight`` -> (``model.layers.``, 3, ``mlp.up_proj.weight``)."""
    match = _NUMBER.search(name)
    return (name[: match.start(1)], int(match[1]), name[match.end() :]) if match else ("", None, name)
