"""The table of a run, what it says in words, and where it is written.

The ideal distance is XRIGHT's (arXiv 2410.15483, section 5): √((f_DPO - f*_DPO)² + (f_SFT - f*_SFT)²), in nats, with f* the best
value of each held-out loss in this table. It needs no generation and no judge, so it ranks rows on any data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft.provenance import to_json
from paft.report.render import Column, to_markdown

if TYPE_CHECKING:
    from paft.recipe import RunRecipe
    from paft.report.sparsity import SparsityReport

SCHEMA = 1
Score = Mapping[str, float]

COLUMNS = [
    Column("name", "model"),
    Column("exact_match", "exact", ".2f", "share of SFT answers that match exactly"),
    Column("sft_loss", "SFT loss", ".2f", "held-out cross-entropy a token"),
    Column("dpo_loss", "DPO loss", ".2f", "held-out DPO loss against the base"),
    Column("pref_accuracy", "pref acc", ".2f", "held-out pairs ranked right"),
    Column("opener", "opener", ".2f", "generated answers with a polite opener"),
    Column("fact", "fact", ".2f", "... that state the true fact"),
    Column("closer", "closer", ".2f", "... that end politely"),
    Column("text_loss", "text loss", ".2f", "cross-entropy on neutral text (forgetting)"),
    Column("ideal", "ideal dist", ".2f", "distance to the best SFT and DPO loss of this table; less is better"),
]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns that at least one row has."""
    return [column for column in COLUMNS if any(column.key in row for row in rows)]


def task_columns(rows: Iterable[Mapping[str, Any]]) -> list[Column]:
    """One column a named task (`paft.tasks`) that at least one row was asked."""
    told = {name: about for row in rows for name, about in row.get("tasks", {}).items()}
    return [Column(name, name, ".3f", f"lm-eval: {about['metric']}, {about['shots'] or 0} shots, {about['rows']} rows")
            for name, about in told.items()]


def ideal_distances(scores: Mapping[str, Score]) -> dict[str, float]:
    """√(Δ²_SFT + Δ²_DPO) of every row that has both losses, Δ against the best of the table."""
    both = {name: (s["sft_loss"], s["dpo_loss"]) for name, s in scores.items() if "sft_loss" in s and "dpo_loss" in s}
    if not both:
        return {}
    best = [min(pair[i] for pair in both.values()) for i in (0, 1)]
    return {name: math.dist(pair, best) for name, pair in both.items()}


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of pairs of losses, sorted: those than which no other is at least as low in both."""
    unique = set(points)
    return sorted(one for one in unique if not any(two[0] <= one[0] and two[1] <= one[1] for two in unique - {one}))


def group_of(name: str, recipe: RunRecipe) -> str:
    """What kind of row this is, from the recipe alone: base, one objective, sequential, joint, merge or control."""
    if name in recipe.merge:
        entry = recipe.merge[name]
        first = recipe.train[entry.of[0]]
        return "control" if entry.density_like or first.l2 or (entry.norm_like and not first.l1) else "merge"
    if name not in recipe.train:
        return "base"
    stage = recipe.train[name]
    if stage.on:
        return "sequential"
    return "joint" if stage.objective == "joint" else "single"


def rows_of(recipe: RunRecipe, scores: Mapping[str, Score]) -> list[dict[str, Any]]:
    """One row a candidate, in the recipe's order, with label, group and ideal distance."""
    distance = ideal_distances(scores)
    labels = {name: stage.label or name for name, stage in (*recipe.train.items(), *recipe.merge.items())}
    before = {name: {"on": stage.on, "after": recipe.train[stage.on].objective}
              for name, stage in recipe.train.items() if stage.on}
    return [{"name": labels.get(name, name), "id": name, "group": group_of(name, recipe), **before.get(name, {}), **score,
             **({"ideal": distance[name]} if name in distance else {})} for name, score in scores.items()]


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences that hold for these rows: what each way of combining reached, best first, and who is nearest the ideal point."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in sorted((row for row in rows if "ideal" in row), key=lambda row: row["ideal"]):
        best.setdefault(row["group"], row)
    combined = [best[group] for group in ("sequential", "joint", "merge", "control") if group in best]
    if not combined:
        return []
    combined.sort(key=lambda row: row["ideal"])
    said = _taxes(rows)
    said += [f"Nearest to the ideal point: {combined[0]['name']} ({combined[0]['group']}), {combined[0]['ideal']:.2f} nats away."]
    said += [f"Best {row['group']}: {row['name']} ({_brief(row)})." for row in combined]
    return said


def _taxes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each second stage cost the skill of the first, in the skill's own measure."""
    by_id, said = {row["id"]: row for row in rows if "id" in row}, []
    for row in rows:
        first = by_id.get(row.get("on"))
        key, name = ("pref_accuracy", "preference accuracy") if row.get("after") == "dpo" else ("exact_match", "exact match")
        if first and key in row and key in first:
            said.append(f"{row['name']}: {name} {first[key]:.2f} after {first['name']}, {row[key]:.2f} at the end.")
    return said


def _brief(row: Mapping[str, Any]) -> str:
    parts = [("exact_match", "exact match"), ("pref_accuracy", "preference accuracy"), ("opener", "polite"),
             ("ideal", "ideal distance")]
    return ", ".join(f"{label} {row[key]:.2f}" for key, label in parts if key in row)


def write_report(out: Path, recipe: RunRecipe, scores: Mapping[str, Score], adapters: Mapping[str, SparsityReport], *,
                 wall_s: float) -> dict[str, Any]:
    """Write report.json, report.md, tradeoff.png and sparsity.png into ``out``; returns what report.json holds."""
    from paft.report.plots import sparsity_figure, tradeoff_figure

    rows = rows_of(recipe, scores)
    report = {
        "schema": SCHEMA, "name": recipe.name, "model": recipe.model, "seed": recipe.seed, "split": recipe.evaluate.split,
        "rows": rows, "findings": findings(rows), "wall_s": wall_s,
        "adapters": {name: {"share_below_1e-5": r.overall.moments.share_scaled, "frobenius": r.overall.moments.frobenius,
                            "verdict": r.verdict.word, "small": r.verdict.small} for name, r in adapters.items()},
    }
    (out / "report.json").write_text(to_json(report), encoding="utf-8")
    text = [f"# {recipe.name}", f"Model `{recipe.model}`, seed {recipe.seed}, {recipe.evaluate.split} split.",
            to_markdown(rows, columns_of(rows) + task_columns(rows)), "\n".join(f"- {line}" for line in report["findings"])]
    (out / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    shown = [row for row in rows if row["group"] not in ("base",)]
    metrics = ("exact_match", "pref_accuracy") if any("exact_match" in row for row in rows) else ("sft_loss", "dpo_loss")
    titles = {column.key: column.help for column in COLUMNS}
    tradeoff_figure(shown, out / "tradeoff.png", x=metrics[0], y=metrics[1], groups="group",
                    title=f"{recipe.name}, seed {recipe.seed}", xlabel=titles[metrics[0]], ylabel=titles[metrics[1]])
    single = [report for name, report in adapters.items() if group_of(name, recipe) == "single"]
    sparsity_figure(single, out / "sparsity.png")
    return report
