"""A pipeline over several seeds as tables, CSV, and what the numbers say in words."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from paft.report.headtohead import COLUMNS, task_columns
from paft.report.paired import ENOUGH, FEW, Difference
from paft.report.render import Column
from paft.report.seeds import COMBINED, COMPARED, Row, Study, plain, sparse

_MAIN = ("name", "sft_loss", "dpo_loss", "pref_accuracy", "ideal")
_MORE = [
    Column("sft_gap", "SFT gap", ".2f", "SFT loss - the best SFT loss of the run's table"),
    Column("dpo_gap", "DPO gap", ".2f", "DPO loss - the best DPO loss of the run's table"),
    Column("sft_tax", "SFT tax", ".2f", "SFT loss - that of SFT alone"),
    Column("dpo_tax", "DPO tax", ".2f", "DPO loss - that of DPO alone"),
    Column("forgetting", "forgetting", ".2f", "loss on neutral text - that of the base"),
    Column("seconds", "train s", ",.0f", "wall time of all trainings that the row needs"),
    Column("tokens", "tokens", ",.3g", "trained on, over the same trainings"),
    Column("memory_mb", "peak MB", ",.0f", "the largest of the same trainings"),
]
_DENSE = "dense SFT"
_VERBS = {-1: "it helps", 1: "it harms", 0: "no difference that these seeds could show"}
Table = tuple[str, list[Row], list[Column]]


def tables(study: Study, rows: Sequence[Row]) -> list[Table]:
    """The means with every column there is, and for each baseline the differences to it in all that is compared."""
    tasks = _tasks(study)
    known = [column.key for column in (*COLUMNS, *tasks, *_MORE)]
    other = [key for key in dict.fromkeys(key for row in rows for key in row) if f"{key}_se" in rows[0] and key not in known]
    columns = [*COLUMNS, *tasks, *(Column(key, key, ".3f") for key in other), *_MORE]
    found = [_means(study, rows, [column for column in columns if any(column.key in row for row in rows)])]
    headers = {column.key: column for column in COLUMNS}
    for base in study.baselines():
        compared = [{"name": row["name"], **{key: interval(found) for key, found in row["vs"][base].items()}}
                    for row in rows if base in row["vs"]]
        found.append((f"Minus {_baseline(study, base)}: {_what(study)}", compared,
                      [headers["name"], *(Column(key, headers[key].header) for key in COMPARED)]))
    return found


def short_tables(study: Study, rows: Sequence[Row]) -> list[Table]:
    """What fits a terminal: both objectives and the ideal distance, and its differences to the baselines."""
    found = [_means(study, rows, [column for column in COLUMNS if column.key in _MAIN])]
    if tasks := _tasks(study):
        given = [row for row in rows if any(column.key in row for column in tasks)]
        title, shown, columns = _means(study, given, [COLUMNS[0], *tasks])
        found.append((f"Named tasks: {title[0].lower()}{title[1:]}", shown, columns))
    compared = [{"name": row["name"], **{base: interval(each["ideal"]) for base, each in row["vs"].items() if "ideal" in each}}
                for row in rows if row["group"] in COMBINED]
    if compared and study.baselines():
        columns = [Column(base, f"minus {_baseline(study, base)}") for base in study.baselines()]
        found.append((f"Ideal distance: {_what(study)}", compared, [COLUMNS[0], *columns]))
    return found


def _tasks(study: Study) -> list[Column]:
    return task_columns(study.runs[0].rows.values())


def _means(study: Study, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    shown = [Column(c.key, c.header, c.format, c.help, f"{c.key}_se" if c.key != "name" else "") for c in columns]
    several = len(study.runs) > 1
    return (f"Mean ± standard error over {len(study.runs)} seeds" if several else "One seed"), list(rows), shown


def _what(study: Study) -> str:
    return "mean [95 % interval]" if len(study.runs) >= ENOUGH else "mean, without an interval"


def _baseline(study: Study, base: str) -> str:
    several = base == "sequential" and len(study.sequences()) > 1
    return study.name(study.baselines()[base]) + (" (the best sequence)" if several else "")


def interval(found: Mapping[str, Any]) -> str:
    """``-0.74 [-1.30, -0.05]``; without an interval the mean alone."""
    low, high = found["low"], found["high"]
    return f"{found['mean']:+.2f}" + ("" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")


def to_csv(rows: Sequence[Row]) -> str:
    """One line a row; a difference is ``vs_BASELINE_METRIC`` with ``_low`` and ``_high``."""
    flat = []
    for row in rows:
        one = {key: value for key, value in row.items() if key != "vs"}
        for base, metrics in row["vs"].items():
            for metric, found in metrics.items():
                name = f"vs_{base}_{metric}"
                one |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        flat.append({key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in one.items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for one in flat for key in one)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def findings(study: Study, rows: Sequence[Row]) -> list[str]:
    """Sentences that follow from the numbers: who is nearest, who beats the baselines, what L1 does, what is not known."""
    ranked = sorted((row for row in rows if "ideal" in row and row["group"] != "base"), key=lambda row: row["ideal"])
    best: dict[str, Row] = {}
    for row in ranked:
        best.setdefault(row["group"], row)
    said = [f"Nearest to the ideal point: {row['name']} ({row['group']}), {_brief(row, 'ideal')} nats." for row in ranked[:1]]
    said += [f"Best {group}: {row['name']}, ideal distance {_brief(row, 'ideal')}, SFT loss {_brief(row, 'sft_loss')}, "
             f"preference accuracy {_brief(row, 'pref_accuracy')}." for group, row in best.items() if row is not ranked[0]]
    return said + _unlearned(study) + _taxes(study, rows) + _against(study, rows) + _l1(study) + _limits(study)


def _brief(row: Row, key: str) -> str:
    error = row.get(f"{key}_se", math.nan)
    return f"{row[key]:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}") if key in row else "-"


def _unlearned(study: Study) -> list[str]:
    """A specialist that is no better than the base at its own objective: then there is no skill to combine."""
    said = []
    for objective, metric in (("sft", "sft_loss"), ("dpo", "dpo_loss")):
        alone = study.alone(objective)
        if alone is None or "base" not in study.runs[0].rows:
            continue
        found = study.vs([alone], ["base"], metric)
        if found.mean >= 0 if math.isnan(found.low) else found.sign >= 0:
            lost = interval(found.to_dict())
            said.append(f"{study.name(alone)} alone is not better than the base at its own objective ({lost} nats held out): "
                        "distances say what was lost, not what was combined. Train it longer.")
    return said


def _taxes(study: Study, rows: Sequence[Row]) -> list[str]:
    """What sequences pay in each skill."""
    by_id = {row["id"]: row for row in rows}
    said = [f"{row['name']}: SFT loss {row['sft_tax']:+.2f} beside SFT alone, DPO loss {row['dpo_tax']:+.2f} beside DPO alone."
            for row in map(by_id.__getitem__, study.sequences()) if {"sft_tax", "dpo_tax"} <= row.keys()]
    kept = sorted((row for row in rows if row["group"] in COMBINED and "forgetting" in row), key=lambda row: row["forgetting"])
    if len(kept) > 1:
        least, most = kept[0], kept[-1]
        said.append(f"Forgets least: {least['name']}, {least['forgetting']:+.2f} nats on neutral text; most: {most['name']}, "
                    f"{most['forgetting']:+.2f}.")
    return said


def _against(study: Study, rows: Sequence[Row]) -> list[str]:
    """How many rows an interval puts on one side of each baseline."""
    said = []
    combined = [row for row in rows if row["group"] in COMBINED]
    for base, other in study.baselines().items():
        differences = [Difference(**row["vs"][base]["ideal"]) for row in combined if "ideal" in row["vs"].get(base, {})]
        if differences and len(study.runs) >= ENOUGH:
            near, far = (sum(one.sign == sign for one in differences) for sign in (-1, 1))
            said.append(f"Of {len(differences)} other ways to combine both, {near} are nearer to the ideal point than "
                        f"{study.name(other)}, {far} farther; for {len(differences) - near - far} the interval contains 0.")
    return said


def _l1(study: Study) -> list[str]:
    """What an L1 term on the SFT does to merges, beside its controls, and to sequences: differences of the ideal distance."""
    said = []
    train = study.recipe.get("train", {})
    for what, pairs in l1_pairs(study.recipe).items():
        stage, _, other = what.partition("/")
        found = study.vs([one for one, _ in pairs], [two for _, two in pairs], "ideal")
        methods = f"{len(pairs)} method{'s' * (len(pairs) > 1)}"
        said.append(f"{study.name(stage)} in merges, beside {other} ({methods}): {_told(found)}.")
    for name, stage in train.items():
        same = (stage.get("on"), stage["objective"])
        dense = [other for other, two in train.items() if (two.get("on"), two["objective"]) == same and plain(two)]
        if sparse(stage) and stage.get("on") and dense:
            found = study.vs([name], dense[:1], "ideal")
            said.append(f"L1 in a sequence ({study.name(name)} - {study.name(dense[0])}): {_told(found)}.")
    return said


def _told(found: Difference) -> str:
    verdict = "" if math.isnan(found.low) else f", {_VERBS[found.sign]}"
    return f"{interval(found.to_dict())} nats{verdict}"


def l1_pairs(recipe: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """"STAGE/what" -> (merge with that sparse stage, merge to compare it with), one pair a method.

    The dense merge of a method may have settings of its own; a control has those of the merge that it controls, with a dense
    delta pruned to the density or brought to the norm of the sparse one, or with an L2 penalty in the place of L1.
    """
    train, merge = recipe.get("train", {}), recipe.get("merge", {})
    controlled = {entry.get(key) for entry in merge.values() for key in ("density_like", "norm_like")}
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for name, entry in merge.items():
        stage = entry["of"][0]
        if not sparse(train[stage]):
            continue
        for other, two in merge.items():
            kind = _kind(train, two)
            dense = kind == _DENSE and _alike(two, entry, "method")
            if dense or (kind not in ("", _DENSE) and stage in controlled and _controls(two, entry, stage)):
                found.setdefault(f"{stage}/{kind}", {}).setdefault(entry["method"], (name, other))
    return {what: list(pairs.values()) for what, pairs in found.items()}


def _kind(train: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """What a merge is to one with an L1 term; nothing if it has one itself."""
    first = train[entry["of"][0]]
    if sparse(first):
        return ""
    if first.get("l2"):
        return "an L2 penalty"
    if entry.get("density_like"):
        return "dense SFT pruned alike"
    return "dense SFT of equal norm" if entry.get("norm_like") else _DENSE


def _controls(control: Mapping[str, Any], entry: Mapping[str, Any], stage: str) -> bool:
    """Has a control the settings of ``entry``, and the density or norm that its first adapter ends up with?"""
    same = _alike(control, entry, "method", "weights", "parameters")
    return same and (control.get("density_like") or control.get("norm_like")) in (stage, entry.get("norm_like"))


def _alike(one: Mapping[str, Any], two: Mapping[str, Any], *keys: str) -> bool:
    return all((one.get(key) or None) == (two.get(key) or None) for key in keys)


def _limits(study: Study) -> list[str]:
    """What so few seeds cannot tell."""
    count = len(study.runs)
    if count < ENOUGH:
        return [f"{count} seed{'s' * (count > 1)}: no interval; with fewer than {ENOUGH} it would say nothing."]
    return [f"Differences are paired within each run. {FEW}"]
