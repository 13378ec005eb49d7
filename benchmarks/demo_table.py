"""A second base: `paft run demo` on both embedded bases and three seeds, mean ± standard error over the seeds of a base.

    python benchmarks/demo_table.py [-o DIR] [--seeds 0 1 2] [--models demo:a demo:b]

Finished stages are kept, so a run that was stopped continues. Writes benchmarks/demo.md (the tables, and paired differences over
all runs for the questions that the papers raise), benchmarks/demo.json (every number) and benchmarks/demo.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from paft.models import quiet_libraries

quiet_libraries()

from paft.catalog import find  # noqa: E402 - threads are set before torch loads
from paft.provenance import to_json  # noqa: E402
from paft.recipe import RunRecipe, load  # noqa: E402
from paft.report.headtohead import COLUMNS, columns_of  # noqa: E402
from paft.report.paired import mean_error  # noqa: E402
from paft.report.plots import tradeoff_figure  # noqa: E402
from paft.report.render import Column, to_markdown  # noqa: E402
from paft.report.seeds import Study, study  # noqa: E402
from paft.run import run  # noqa: E402

HERE = Path(__file__).parent
METRICS = [column.key for column in COLUMNS if column.key != "name"]
METHODS = ("linear", "task_arithmetic", "ties", "slerp", "dare_linear", "dare_ties")

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


def paired(studies: list[Study], left: list[str], right: list[str]) -> dict[str, float]:
    """Mean and standard error, over all runs, of (mean of the left rows) - (mean of the right rows), for each metric."""
    found: dict[str, float] = {}
    for metric in METRICS:
        found |= zip((metric, f"{metric}_se"), mean_error([d for one in studies for d in one.differences(left, right, metric)]),
                     strict=True)
    return found


def with_errors(columns: list[Column]) -> list[Column]:
    return [Column(c.key, c.header, c.format, c.help, f"{c.key}_se" if c.key != "name" else "") for c in columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "out" / "demo_table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=["demo:a", "demo:b"])
    options = parser.parse_args()
    places: dict[str, list[Path]] = {model: [] for model in options.models}
    for seed in options.seeds:
        for model in options.models:
            recipe = load(RunRecipe, find("demo"), (f"seed={seed}", f"model={model}"))
            places[model].append(options.out / f"{model.replace(':', '-')}-{seed}")
            run(recipe, places[model][-1], resume=True)
    write({model: study(found) for model, found in places.items()})


def write(studies: dict[str, Study]) -> None:
    """The tables of the studies, model by model, and what is paired over all of them."""
    count = len(next(iter(studies.values())).runs)
    parts = [f"# The demo, {count} seeds on each of {len(studies)} bases\n\nMade by "
             f"`python benchmarks/demo_table.py`; test split; mean ± standard error over seeds."]
    for model, found in studies.items():
        rows = found.rows()
        parts.append(f"## Base `{model}`\n\n" + to_markdown(rows, with_errors(columns_of(rows))))
    differences = [{"name": question, **paired(list(studies.values()), left, right)} for question, left, right in QUESTIONS]
    parts.append(f"## Paired differences over all {sum(len(found.runs) for found in studies.values())} runs\n\n"
                 + to_markdown(differences, with_errors(columns_of(differences))))
    (HERE / "demo.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    reports = {model: [json.loads((run.path / "report.json").read_text(encoding="utf-8")) for run in found.runs]
               for model, found in studies.items()}
    (HERE / "demo.json").write_text(to_json({"reports": reports, "paired": differences}), encoding="utf-8")
    model, first = next(iter(studies.items()))
    rows = [row for row in first.rows() if row["group"] != "base"]
    tradeoff_figure(rows, HERE / "demo.png", x="exact_match", y="pref_accuracy", groups="group", xerr="exact_match_se",
                    yerr="pref_accuracy_se", title=f"{model}, mean of {count} seeds",
                    xlabel="exact match on the SFT tasks", ylabel="held-out preference accuracy")
    print(json.dumps({model: len(found.runs) for model, found in studies.items()}), "->", HERE / "demo.md")


if __name__ == "__main__":
    main()
