"""The README's table: `paft run demo` on both bases and three seeds, mean ± standard error over the seeds of a base.

    python benchmarks/demo_table.py [-o DIR] [--seeds 0 1 2] [--models demo:a demo:b]

Finished stages are kept, so a run that was stopped continues. Writes benchmarks/demo.md (the tables, and paired differences over
all runs for the questions that the papers raise), benchmarks/demo.json (every number), benchmarks/demo.png, and the short table
and the differences of the README, between its <!-- table --> marks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from paft.models import quiet_libraries

quiet_libraries()

from paft.catalog import find  # noqa: E402 - threads are set before torch loads
from paft.recipe import RunRecipe, load  # noqa: E402
from paft.report.headtohead import COLUMNS, columns_of  # noqa: E402
from paft.report.plots import tradeoff_figure  # noqa: E402
from paft.report.render import Column, to_json, to_markdown  # noqa: E402
from paft.run import run  # noqa: E402

HERE = Path(__file__).parent
METRICS = [column.key for column in COLUMNS if column.key != "name"]
METHODS = ("linear", "task_arithmetic", "ties", "slerp", "dare_linear", "dare_ties")
SHORT = ("base", "sft", "sft-l1", "dpo", "sft-dpo", "dpo-sft", "dpo-sft-l1", "mix", *METHODS, "task_arithmetic-l1",
         "task_arithmetic-sparse", "ties-l1", "pruned", "shrunk", "l2")
SHORT_METRICS = ("exact_match", "pref_accuracy", "ideal")

# (question, rows of one side, rows of the other): the difference of means is paired within each run.
QUESTIONS = [
    ("merge with SFT-L1 minus the same merge with dense SFT, mean of 6 methods", [f"{m}-l1" for m in METHODS], list(METHODS)),
    ("L1 minus L2 at equal norm (task arithmetic)", ["task_arithmetic-l1"], ["l2"]),
    ("L1 minus dense shrunk to equal norm (task arithmetic)", ["task_arithmetic-l1"], ["shrunk"]),
    ("L1 minus dense pruned to equal density (task arithmetic)", ["task_arithmetic-l1"], ["pruned"]),
    ("task arithmetic with L1 minus SFT then DPO", ["task_arithmetic-l1"], ["sft-dpo"]),
    ("task arithmetic with L1 minus DPO then SFT-L1", ["task_arithmetic-l1"], ["dpo-sft-l1"]),
    ("task arithmetic with L1 minus Mix", ["task_arithmetic-l1"], ["mix"]),
    ("task arithmetic with L1, λ x 10, minus dense", ["task_arithmetic-sparse"], ["task_arithmetic"]),
    ("DPO then SFT-L1 minus DPO then SFT", ["dpo-sft-l1"], ["dpo-sft"]),
    ("task arithmetic with L1 minus DPO alone", ["task_arithmetic-l1"], ["dpo"]),
    ("DPO then SFT minus DPO alone (the tax on preference)", ["dpo-sft"], ["dpo"]),
    ("SFT then DPO minus SFT alone (the tax on tasks)", ["sft-dpo"], ["sft"]),
]


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def averaged(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: mean and standard error of each metric over the reports."""
    rows = []
    for index, first in enumerate(reports[0]["rows"]):
        row = {"name": first["name"], "id": first["id"], "group": first["group"]}
        for metric in METRICS:
            values = [report["rows"][index][metric] for report in reports if metric in report["rows"][index]]
            if values:
                row |= {metric: statistics.mean(values), f"{metric}_se": error(values)}
        rows.append(row)
    return rows


def paired(reports: list[dict[str, Any]], left: list[str], right: list[str]) -> dict[str, float]:
    """Mean and standard error, over runs, of (mean of the left rows) - (mean of the right rows), for each metric."""
    found: dict[str, float] = {}
    for metric in METRICS:
        differences = []
        for report in reports:
            value = {row["id"]: row.get(metric, math.nan) for row in report["rows"]}
            differences.append(statistics.mean(value[i] for i in left) - statistics.mean(value[i] for i in right))
        found |= {metric: statistics.mean(differences), f"{metric}_se": error(differences)}
    return found


def with_errors(columns: list[Column]) -> list[Column]:
    return [Column(c.key, c.header, c.format, c.help, f"{c.key}_se" if c.key != "name" else "") for c in columns]


def short(reports: dict[str, list[dict[str, Any]]], differences: list[dict[str, Any]]) -> str:
    """The README's part: four columns of each base for the rows that answer a question, and the paired differences."""
    bases = {model: {row["id"]: row for row in averaged(found)} for model, found in reports.items()}
    rows = []
    for name in SHORT:
        row = {"name": next(iter(bases.values()))[name]["name"]}
        for model, found in bases.items():
            row |= {f"{model} {key}": value for key, value in found[name].items() if isinstance(value, float)}
        rows.append(row)
    columns = [Column("name", "model")]
    columns += [Column(f"{model} {c.key}", f"{model[-1]}: {c.header}", c.format, "", f"{model} {c.key}_se")
                for model in bases for c in COLUMNS if c.key in SHORT_METRICS]
    signs = [c for c in with_errors(COLUMNS) if c.key in ("name", *SHORT_METRICS)]
    return "\n\n".join([to_markdown(rows, columns).strip(), "Paired differences over all runs (ideal distance: less is better):",
                        to_markdown(differences, [Column("name", "difference"), *signs[1:]]).strip()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "out" / "demo_table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=["demo:a", "demo:b"])
    options = parser.parse_args()
    reports: dict[str, list[dict[str, Any]]] = {model: [] for model in options.models}
    for seed in options.seeds:
        for model in options.models:
            recipe = load(RunRecipe, find("demo"), (f"seed={seed}", f"model={model}"))
            reports[model].append(run(recipe, options.out / f"{model.replace(':', '-')}-{seed}", resume=True))
    everything = [report for found in reports.values() for report in found]
    parts = [f"# The demo, {len(options.seeds)} seeds on each of {len(options.models)} bases\n\nMade by "
             f"`python benchmarks/demo_table.py`; test split; mean ± standard error over seeds."]
    for model, found in reports.items():
        rows = averaged(found)
        parts.append(f"## Base `{model}`\n\n" + to_markdown(rows, with_errors(columns_of(rows))))
    differences = [{"name": question, **paired(everything, left, right)} for question, left, right in QUESTIONS]
    parts.append(f"## Paired differences over all {len(everything)} runs\n\n"
                 + to_markdown(differences, with_errors(columns_of(differences))))
    (HERE / "demo.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (HERE / "demo.json").write_text(to_json({"reports": reports, "paired": differences}), encoding="utf-8")
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->")
    made = short(reports, differences)
    readme.write_text(f"{before}<!-- table -->\n{made}\n<!-- /table -->{after}", encoding="utf-8")
    rows = [row for row in averaged(reports[options.models[0]]) if row["group"] != "base"]
    tradeoff_figure(rows, HERE / "demo.png", x="exact_match", y="pref_accuracy", groups="group", xerr="exact_match_se",
                    yerr="pref_accuracy_se", title=f"{options.models[0]}, mean of {len(options.seeds)} seeds",
                    xlabel="exact match on the SFT tasks", ylabel="held-out preference accuracy")
    print(json.dumps({model: len(found) for model, found in reports.items()}), "->", HERE / "demo.md")


if __name__ == "__main__":
    main()
