"""The authors' rule to stop: as good as a reference Pareto front (arXiv 2410.15483, appendix D.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from paft.data import Row, content_hash
from paft.errors import MismatchError, NotFoundError, UsageError
from paft.provenance import read_manifest
from paft.recipe import JointRecipe
from paft.train.work import read_log

Point = tuple[float, float]  # (f_DPO, f_SFT) on held-out rows


def check(recipe: JointRecipe, rows: Mapping[str, Sequence[Row]]) -> None:
    """What `read` raises, and MismatchError for a front of other held-out rows or another β; before any work."""
    if recipe.stop_front is None:
        return
    read(recipe.stop_front)
    if recipe.trainer.get("eval_strategy") == "no":
        raise UsageError("stop_front is looked at in evaluations, and trainer.eval_strategy is no", hint="leave one of them out")
    for place in {log.parent for log in _logs(recipe.stop_front)}:
        made = read_manifest(place) or {"recipe": {}, "inputs": {}}
        for name in ("sft_eval", "pref_eval"):
            if made["inputs"].get(name) not in (None, content_hash(list(rows[name]))):
                raise MismatchError(f"{place} was measured on other held-out rows, so its front says nothing here",
                                    hint=f"hold out the same rows, for example by --{name.replace('_', '-')}-data")
        if (beta := made["recipe"].get("beta", recipe.beta)) != recipe.beta:
            raise MismatchError(f"{place} was measured with β = {beta:g}, so its front says nothing with {recipe.beta:g}")


def _logs(directory: str) -> list[Path]:
    place = Path(directory).expanduser()
    return sorted([*place.glob("log.jsonl"), *place.glob("*/log.jsonl")])


def read(directory: str) -> list[Point]:
    """The Pareto front of the evaluations that a training, or each training in a directory of them, has logged.

    No point of a front is at least as good as another in both objectives. NotFoundError without a log, UsageError for logs
    that have not measured both.
    """
    logs = _logs(directory)
    if not logs:
        raise NotFoundError(f"no log.jsonl in {directory} or one level below", hint="name what `paft train-joint` has made")
    records = [record for log in logs for record in read_log(log)]
    points = {(each["eval_dpo_loss"], each["eval_sft_loss"]) for each in records
              if "eval_dpo_loss" in each and "eval_sft_loss" in each}
    if not points:
        raise UsageError(f"{directory} has no evaluation of both objectives in its log", hint="train it with held-out rows")
    return sorted(one for one in points if not any(reached(two, [one]) for two in points - {one}))


def reached(point: Point, front: list[Point], slack: float = 0.0) -> bool:
    """Is ``point`` at least as good as some point of ``front`` in both objectives, give or take ``slack``?"""
    return any(point[0] <= dpo + slack and point[1] <= sft + slack for dpo, sft in front)
