"""The authors' rule to stop: as good as a reference Pareto front (arXiv 2410.15483, appendix D.2)."""

from __future__ import annotations

import json
from pathlib import Path

from paft.errors import NotFoundError, UsageError

Point = tuple[float, float]  # (f_DPO, f_SFT) on held-out rows


def read(directory: str) -> list[Point]:
    """The Pareto front of the evaluations that a training, or each training in a directory of them, has logged.

    No point of a front is at least as good as another in both objectives. NotFoundError without a log, UsageError for logs
    that have not measured both.
    """
    place = Path(directory).expanduser()
    logs = sorted([*place.glob("log.jsonl"), *place.glob("*/log.jsonl")])
    if not logs:
        raise NotFoundError(f"no log.jsonl in {directory} or one level below", hint="name what `paft train-joint` has made")
    records = [json.loads(line) for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    points = {(each["eval_dpo_loss"], each["eval_sft_loss"]) for each in records
              if "eval_dpo_loss" in each and "eval_sft_loss" in each}
    if not points:
        raise UsageError(f"{directory} has no evaluation of both objectives in its log", hint="train it with held-out rows")
    return sorted(one for one in points if not any(reached(two, [one]) for two in points - {one}))


def reached(point: Point, front: list[Point], slack: float = 0.0) -> bool:
    """Is ``point`` at least as good as some point of ``front`` in both objectives, give or take ``slack``?"""
    return any(point[0] <= dpo + slack and point[1] <= sft + slack for dpo, sft in front)
