"""One row of a recipe's data as the trainer will see it: `--show-sample`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from paft.train.inputs import AnyRecipe, load, tokenizer_for
from paft.train.rendering import Sequence, render


def show_sample(recipe: AnyRecipe, *, quiet: bool = False) -> dict[str, Any]:
    """The first training row of each objective, rendered, with the tokens that are trained on; nothing is trained or written.

    ``samples`` holds one entry for each sequence (two for a preference pair): ``segments`` of text that are ``trained`` or not,
    ``input_ids``, ``labels`` (-100 where not trained), and ``length`` before the cut to ``trainer.max_length``.
    """
    rows = load(recipe, quiet)
    tokenizer = tokenizer_for(recipe, rows, quiet)
    first = {name: found[:1] for name, found in rows.items() if found and not name.endswith("eval")}
    samples = [_sample(tokenizer, name, sequence)
               for name, found in first.items() for sequence in render(tokenizer, found, recipe)[0]]
    return {"command": recipe.kind, "rows": {name: len(found) for name, found in rows.items()}, "samples": samples}


def _sample(tokenizer: Any, name: str, sequence: Sequence) -> dict[str, Any]:
    segments: list[dict[str, Any]] = []
    end = 0
    for trained, run in groupby(sequence.trained):
        start, end = end, end + len(list(run))
        # Decoded from the beginning: alone, a run would lose the space before its first word.
        text = tokenizer.decode(sequence.ids[:end])[len(tokenizer.decode(sequence.ids[:start])):]
        segments.append({"trained": trained, "tokens": end - start, "text": text})
    labels = [token if trained else -100 for token, trained in zip(sequence.ids, sequence.trained, strict=True)]
    return {"set": name, "part": sequence.name, "tokens": len(sequence.ids), "trained": sum(sequence.trained),
            "length": sequence.length, "segments": segments, "input_ids": sequence.ids, "labels": labels}
