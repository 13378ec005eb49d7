"""The ways of methods through the objective space, mean over the seeds: what XRIGHT's Figures 3 and 4 draw.

    a sequence         base -> after its first stage -> after its last: rows of the table itself, on its own split
    a joint training   its evaluations as it went (`evaluate.trajectory`), on rows of the validation split

So the way of a joint training ends near its row of the table, and not on it: other rows measured it. Nothing is shifted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from paft.report.seeds import OBJECTIVES, Study, needed
from paft.report.trainings import Point


@dataclass(frozen=True)
class Way:
    """Where a row has been; ``steps`` are optimiser steps of a joint training, of a sequence its stages."""

    row: str
    staged: bool
    split: str
    steps: tuple[int, ...]
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        found = [{"step": step, **dict(zip(OBJECTIVES, point, strict=True))}
                 for step, point in zip(self.steps, self.points, strict=True)]
        return {"id": self.row, "split": self.split, "points": found}


def ways(study: Study) -> list[Way]:
    """One for each sequence of the recipe, and for each training that every run has measured on its way."""
    train = study.recipe.get("train", {})
    found = [_staged(study, name) if stage.get("on") else _gone(study, name) for name, stage in train.items()]
    return [each for each in found if len(each.points) > 1]


def split_of(study: Study) -> str:
    """The split that the rows of the table are measured on."""
    return (study.recipe.get("evaluate") or {}).get("split", "test")


def _staged(study: Study, name: str) -> Way:
    """From the base over the stages before it."""
    rows = [row for row in ("base", *reversed(needed(study.recipe, name))) if row in study.runs[0].rows]
    points = [(mean(study.values(row, OBJECTIVES[0])), mean(study.values(row, OBJECTIVES[1]))) for row in rows]
    if any(map(math.isnan, sum(points, ()))):
        return Way(name, True, "", (), ())
    return Way(name, True, split_of(study), tuple(range(len(rows))), tuple(points))


def _gone(study: Study, name: str) -> Way:
    """The mean at the steps that all runs have measured at."""
    each = [run.ways.get(name, {}) for run in study.runs]
    steps = [step for step in each[0] if all(step in one for one in each)]
    return Way(name, False, "validation", tuple(steps), tuple(_mean([one[step] for one in each]) for step in steps))


def _mean(points: Sequence[Point]) -> Point:
    return mean(x for x, _ in points), mean(y for _, y in points)
