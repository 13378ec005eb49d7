"""The trials of a study that no other beats on both losses, as rows, figure and merge recipes.

Chosen on the validation rows, told by the test rows: the figures of a search's own choice are too good, as those of any maximum
over many. ``kept`` says which points are still beaten by no other point of the front on the test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from paft.report.headtohead import ideal_distances
from paft.report.plots import MARKERS, PALETTE, canvas, legend, save, titles
from paft.report.render import Column

LOSSES = ("sft_loss", "dpo_loss")
COLUMNS = [
    Column("point", "point"),
    Column("settings", "weights, parameters"),
    Column("validation_sft_loss", "SFT val", ".2f", "SFT loss on the validation rows, by which points are chosen"),
    Column("validation_dpo_loss", "DPO val", ".2f", "DPO loss against the base there"),
    Column("sft_loss", "SFT test", ".2f", "the same on the test rows, which no choice has seen"),
    Column("dpo_loss", "DPO test", ".2f"),
    Column("pref_accuracy", "pref acc", ".2f", "pairs of the test rows ranked right"),
]


def front_of(trials: Sequence[Any]) -> list[Any]:
    """The trials that no other equals or beats on both losses, from the best SFT loss to the best DPO loss."""
    found: list[Any] = []
    for trial in sorted(trials, key=lambda one: (*one.values, one.number)):
        if not found or trial.values[1] < found[-1].values[1]:
            found.append(trial)
    return found


def rows_of(trials: Sequence[Any], tested: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row a point; ``tested`` has the test scores by a trial's number."""
    rows = []
    for place, trial in enumerate(trials, 1):
        recipe = trial.user_attrs["recipe"]
        rows.append({"point": f"{place:02d}-{recipe['method']}", "trial": trial.number, "method": recipe["method"],
                     "settings": "; ".join(filter(None, [_weights(recipe), _parameters(recipe)])),
                     **{f"validation_{key}": value for key, value in trial.user_attrs["scores"].items()}, **tested[trial.number]})
    distances = ideal_distances({row["point"]: {key: row[f"validation_{key}"] for key in LOSSES} for row in rows})
    kept = {row["trial"] for row in rows if not any(_beats(other, row) for other in rows)}
    return [{**row, "validation_ideal": distances[row["point"]], "kept": row["trial"] in kept} for row in rows]


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] <= other[key] for key in LOSSES) and any(one[key] < other[key] for key in LOSSES)


def _weights(recipe: Mapping[str, Any]) -> str:
    if recipe["weights"] is not None:
        return " ".join(f"{value:.2f}" for value in recipe["weights"])
    entries = [entry for entry in recipe["adapters"] if isinstance(entry, dict)]
    return ", ".join("/".join(f"{rule['value']:.2f}" for rule in entry["weight"][:-1]) for entry in entries)


def _parameters(recipe: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        return " ".join(map(one, value)) if isinstance(value, list) else f"{value:.2f}"

    return "; ".join(f"{key} {one(value)}" for key, value in recipe["parameters"].items())


def write_recipes(out: Path, rows: Sequence[Mapping[str, Any]], trials: Sequence[Any]) -> None:
    """One recipe a point, as `paft merge -c` takes it, with its scores as a comment."""
    for row, trial in zip(rows, trials, strict=True):
        recipe = {key: value for key, value in trial.user_attrs["recipe"].items() if value is not None and value != {}}
        scores = "  ".join(f"{split} SFT {row[prefix + LOSSES[0]]:.4f} DPO {row[prefix + LOSSES[1]]:.4f}"
                           for split, prefix in (("validation", "validation_"), ("test", "")))
        text = f"# paft search, trial {row['trial']}: {scores}\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        (out / f"{row['point']}.yaml").write_text(text, encoding="utf-8")


Rows = Sequence[Mapping[str, Any]]


def front_figure(path: Path, trials: Sequence[Any], rows: Rows, others: Rows) -> None:
    """Every trial on the validation rows, the front's points there and on the test rows; ``others``: each adapter alone."""
    figure, axes = canvas((8.0, 6.0))
    entries = []
    sets = [("trials, validation", [trial.values for trial in trials], "none"),
            ("front, validation", [[row[f"validation_{key}"] for key in LOSSES] for row in rows], "-"),
            ("front, test", [[row[key] for key in LOSSES] for row in rows], ":"),
            *((row["point"], [[row[key] for key in LOSSES]], "none") for row in others)]
    for index, (name, points, line) in enumerate(sets):
        x, y = zip(*points, strict=True)
        style = {"alpha": 0.35, "ms": 5} if index == 0 else {"ms": 8, "mec": "white", "mew": 0.8}
        entries.append((axes.plot(x, y, ls=line, lw=1.2, color=PALETTE[index % len(PALETTE)],
                                  marker=MARKERS[index % len(MARKERS)], **style)[0], name))
    titles(axes, "What merging can trade", "SFT loss (nats a token)", "DPO loss against the base (nats)")
    legend(figure, entries)
    save(figure, path)
