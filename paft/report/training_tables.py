"""Compared trainings as a table, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paft.report.headtohead import front
from paft.report.paired import ENOUGH, FEW, difference
from paft.report.render import Column
from paft.report.trainings import Group, Training

Rows = list[dict[str, Any]]
_NAMES = {"sft": "SFT", "dpo": "DPO"}
_UNSPREAD = ("name", "lam", "runs", "steps")

_COLUMNS = [
    Column("name", "method"),
    Column("lam", "λ", "g", "weight of DPO"),
    Column("runs", "seeds", "d", "trainings that differ in the seed alone: mean ± standard error"),
    Column("steps", "steps", ",.0f", ""),
    Column("sft_loss", "SFT loss", ".3f", "held-out cross-entropy a token, in nats"),
    Column("dpo_loss", "DPO loss", ".3f", "held-out DPO loss, in nats"),
    Column("pref_accuracy", "pref acc", ".3f", "held-out pairs ranked right"),
    Column("sft_gap", "SFT gap", ".3f", "SFT loss - f*"),
    Column("dpo_gap", "DPO gap", ".3f", "DPO loss - f*"),
    Column("ideal", "ideal dist", ".3f", "√(SFT gap² + DPO gap²), a gap below 0 as 0; less is better"),
    Column("seconds", "seconds", ",.3g", "of training, without evaluations"),
    Column("runtime_pct", "runtime %", "+.0f", "beside the sequential row"),
    Column("tokens", "tokens", ",.0f", "trained on, without padding"),
    Column("memory_mb", "peak MB", ",.0f", "device memory, or resident memory on a CPU"),
    Column("memory_pct", "memory %", "+.0f", "beside the sequential row"),
]


def summary(groups: Sequence[Group]) -> tuple[Rows, list[Column]]:
    """One row a method and λ; a column that no row fills is left out, and that of the seeds where each has one."""
    rows = [dict(group.row) for group in groups]
    several = any(row["runs"] > 1 for row in rows)
    shown = [column for column in _COLUMNS if any(row.get(column.key) is not None for row in rows)
             and (column.key != "runs" or several)]
    spread = [Column(c.key, c.header, c.format, c.help, "" if c.key in _UNSPREAD else f"{c.key}_se") for c in shown]
    return rows, spread


def findings(groups: Sequence[Group]) -> list[str]:
    """Sentences that hold for these rows: who is nearest to the ideal point, what it costs, and what the numbers cannot tell."""
    ranked = sorted((group for group in groups if "ideal" in group.row), key=lambda group: group.row["ideal"])
    said = []
    if ranked:
        said.append(f"Nearest to the ideal point: {ranked[0].label}, {_value(ranked[0], 'ideal')} nats away; "
                    f"farthest: {ranked[-1].label}, {_value(ranked[-1], 'ideal')}." if len(ranked) > 1 else
                    f"{ranked[0].label} ends {_value(ranked[0], 'ideal')} nats from the ideal point.")
        ends = {group.label: (group.row["sft_loss"], group.row["dpo_loss"]) for group in ranked}
        best = front(ends.values())
        said.append("On the Pareto front of the ends: " + "; ".join(name for name, end in ends.items() if end in best) + ".")
    costs = [f"{group.label} {group.row['runtime_pct']:+.0f} %"
             + (f" ({group.row['memory_pct']:+.0f} %)" if "memory_pct" in group.row else "")
             for group in groups if "runtime_pct" in group.row]
    said += [f"Training time (memory) beside training in sequence: {'; '.join(costs)}."] if costs else []
    return said + _beside_sequential(groups) + _limits(groups)


def _beside_sequential(groups: Sequence[Group]) -> list[str]:
    """The ideal distance beside that of training in sequence, where there are enough seeds that both have."""
    said = []
    sequential = [group for group in groups if group.members[0].sequential]
    for group in (one for one in groups if one not in sequential):
        for other in [one for one in sequential if one.row["lam"] == group.row["lam"]] or sequential:
            ours, theirs = group.ideals, other.ideals
            seeds = [seed for seed in ours if seed in theirs]
            if len(seeds) >= ENOUGH:
                found = difference([ours[seed] - theirs[seed] for seed in seeds])
                said.append(f"{group.label} - {other.label} over {len(seeds)} seeds, paired: ideal distance {found.mean:+.3f} "
                            f"[{found.low:+.3f}, {found.high:+.3f}].")
    return said + ([FEW] if said else [])


def _value(group: Group, key: str) -> str:
    error = group.row.get(f"{key}_se", math.nan)
    return f"{group.row[key]:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _limits(groups: Sequence[Group]) -> list[str]:
    """What is measured against what, and whatever makes two rows differ beside the method."""
    said = []
    by_table = [group.label for group in groups if "table" in group.row["ideal_from"]]
    by_optima = any({"own", "other"} & set(group.row["ideal_from"]) for group in groups)
    if by_optima:
        said.append("Gaps are measured from f* as the trainings know it"
                    + (f"; for {', '.join(by_table)} from the best final losses of this table." if by_table else "."))
    elif by_table:
        said.append("Gaps are measured from the best final losses of this table: f* is not known (--estimate-optima).")
    members = [one for group in groups for one in group.members]
    for name in _NAMES:
        if len({one.held[name] for one in members if name in one.held}) > 1:
            said.append(f"The {_NAMES[name]} losses are of different held-out rows: they cannot be compared.")
    if len({one.base for one in members}) > 1:
        said.append("The bases differ: losses and gaps of different bases cannot be compared.")
    if len({_beta(one) for one in members if "dpo_loss" in one.end}) > 1:
        said.append("β differs, and so does what a DPO loss means.")
    if len({one.end["steps"] for one in members}) > 1:
        said.append("The budgets differ in steps: seconds and memory are those of each training's own.")
    if any(one.optima for one in members):
        said.append("What it took to estimate f* is not in the seconds.")
    if all(len(group.members) == 1 for group in groups) and len(groups) > 1:
        said.append("One seed each: small differences are noise.")
    return said


def _beta(training: Training) -> Any:
    return training.recipe.get("beta")
