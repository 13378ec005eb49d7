"""The evaluation of a run: every row of the table on held-out data and on named tasks, with one base in memory.

Adapters are put on the resident base and taken off again; a merged model is loaded as it lies on the disk, so that what was
written is what is scored. scores.json keeps the held-out scores of a row, and each of its tasks, by the hash of all that they
depend on; nothing in it is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from paft import data, provenance
from paft.candidates import attached
from paft.errors import MismatchError
from paft.evaluate import Evaluator, Held, judge_of
from paft.jsonfile import read_json
from paft.models import load_model, load_tokenizer
from paft.progress import Progress
from paft.recipe import Splits
from paft.runjob import Run, key_of
from paft.tasks import Harness

Score = dict[str, Any]
SEEN = ("split", "rows", "generate", "batch_size")  # what of `evaluate` the held-out scores depend on


def evaluate_all(job: Run, harness: Harness | None) -> dict[str, Score]:
    """Scores of every row on the recipe's split, and on the tasks that it is asked."""
    store, all_asked = _Store(job.out / "scores.json"), asked(job, harness, list(job.candidates()))
    left = {name: {key: task for key, task in keys.items() if key not in store.known} for name, keys in all_asked.items()}
    if any(left.values()):
        scorer = _Scorer(job, harness)
        with Progress("evaluate", len(left), quiet=job.quiet) as show:
            for done, (name, keys) in enumerate(left.items(), 1):
                for key, score in scorer(name, keys):
                    store.add(key, score)
                show(done, name)
    store.keep([key for keys in all_asked.values() for key in keys])
    return {name: _joined([store.known[key] for key in keys]) for name, keys in all_asked.items()}


def known(job: Run) -> dict[str, Score]:
    """The scores that are there, by their keys."""
    return _Store(job.out / "scores.json").known


def asked(job: Run, harness: Harness | None, names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """What each of these rows is measured on: row -> {key of the cache: task, or None for the held-out rows}."""
    said, held = job.recipe.evaluate, held_of(job)
    context = [said.model_dump(include=set(SEEN)), job.recipe.defaults.dpo.beta, job.base_hash,
               *map(data.content_hash, vars(held).values())]
    contents, places, found = harness.contents if harness else {}, job.candidates(), {}
    for name in names:
        own = provenance.content_hash(places[name])
        found[name] = {key_of(context, own): None} | {key_of("task", job.base_hash, contents[task], own): task
                                                      for task in tasks_of(job, harness, name)}
    return found


def tasks_of(job: Run, harness: Harness | None, name: str) -> list[str]:
    """The tasks that a row is asked."""
    said = job.recipe.evaluate.tasks
    if harness is None or (said and said.only is not None and name not in said.only):
        return []
    return [task.name for task, _ in harness.tasks]


def _joined(parts: list[Score]) -> Score:
    tasks = {name: told for part in parts for name, told in part.get("tasks", {}).items()}
    return {key: value for part in parts for key, value in part.items() if key != "tasks"} | ({"tasks": tasks} if tasks else {})


def held_of(job: Run) -> Held:
    """The rows that every candidate is scored on."""
    said = job.recipe.evaluate
    return Held(job.sft[said.split], job.pref[said.split], job.text).head(said.rows)


@dataclass
class _Store:
    """scores.json; written after each score, so that what fails later costs nothing that is there."""

    file: Path
    known: dict[str, Score] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with suppress(MismatchError):  # cut by an older version: all is computed again
            self.known = read_json(self.file) if self.file.is_file() else {}

    def add(self, key: str, score: Score) -> None:
        self.known[key] = score
        provenance.write_whole(self.file, json.dumps(self.known, indent=1))

    def keep(self, keys: list[str]) -> None:
        """Forget what no row of this recipe has."""
        if self.known.keys() - set(keys):
            self.known = {key: self.known[key] for key in keys}
            provenance.write_whole(self.file, json.dumps(self.known, indent=1))


class _Scorer:
    """The base in memory, and what is measured on it and on what is made of it."""

    def __init__(self, job: Run, harness: Harness | None) -> None:
        recipe, held = job.recipe, held_of(job)
        self.job, self.harness, self.base = job, harness, load_model(recipe.model)
        chat = isinstance(held.sft[0].get("prompt"), list) or bool(harness and harness.chat)
        self.tokenizer = load_tokenizer(recipe.model, chat=chat, template=recipe.chat_template)

    @cached_property
    def held(self) -> Evaluator:
        """The held-out rows, with the base as the reference."""
        recipe, said, pref = self.job.recipe, self.job.recipe.evaluate, self.job.recipe.data.pref
        source = (getattr(pref, said.split) or pref.train) if isinstance(pref, Splits) else pref
        return Evaluator(self.tokenizer, held_of(self.job), None, recipe.defaults.dpo.beta, said.batch_size, said.generate,
                         judge_of(source)).against(self.base)

    def __call__(self, name: str, asked: Mapping[str, str | None]) -> Iterator[tuple[str, Score]]:
        """(key, score) of each of the ``asked`` = {key: task, or None for the held-out rows} of a row."""
        if None in asked.values():
            _ = self.held  # measures the reference, which is the base with nothing on it
        if asked:
            with self._candidate(name) as model:
                for key, task in asked.items():
                    yield key, self.held(model) if task is None else self._asked(name, model, task)

    def _candidate(self, name: str) -> AbstractContextManager[Any]:
        if name in self.job.recipe.train:
            return attached(self.base, str(self.job.adapter(name)))
        return nullcontext(self.base if name == "base" else load_model(str(self.job.merged(name))))

    def _asked(self, name: str, model: Any, task: str) -> Score:
        assert self.harness is not None
        return self.harness(name, model, self.tokenizer, task)
