"""A sparsity report as rows and columns: some deltas side by side, or one by layer, module kind or tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from paft.report.groups import Group, TensorSparsity
from paft.report.moments import Moments
from paft.report.reference import GAUSSIAN, LAPLACE
from paft.report.render import Column
from paft.report.sparsity import SparsityReport
from paft.report.verdict import percent, short

By = Literal["layer", "module", "tensor"]
Rows = list[dict[str, Any]]
_MEANS = ("by layer: mean over layers, as in PAFT; Hoyer to d99 and ranks: means over tensors, pooled: over all entries; "
          "d90, d99: share of entries that holds 90, 99 % of the energy")
Line = tuple[str, str | None, str | None]  # measure, its value, that of Gaussian and Laplace entries
MEANS = {"hoyer": "Hoyer", "n_eff": "N_eff/N", "gini": "Gini", "d90": "d90", "d99": "d99"}


def summary(reports: Sequence[SparsityReport]) -> tuple[Rows, list[Column]]:
    """One row a measure, one column a delta, and what dense Gaussian and Laplace deltas show.

    The Gaussian value of a share depends on the rms, so it is a row below the share; where it equals the share, the share
    says how large the delta is and nothing else. With several, each is also thresholded at the first one's rms.
    """
    columns = [_measures(report, reports) for report in reports]
    known = [index for index in range(len(columns[0])) if any(lines[index][1] is not None for lines in columns)]
    rows: Rows = []
    for index in known:
        label, _, law = columns[0][index]
        values = {str(adapter): lines[index][1] for adapter, lines in enumerate(columns)}
        rows.append({"measure": label, "law": law} | values)
    adapters = [Column(str(index), report.name) for index, report in enumerate(reports)]
    return rows, [Column("measure", "measure", help=_MEANS), Column("law", "Gauss, Laplace"), *adapters]


def breakdown(report: SparsityReport, by: By = "layer") -> tuple[Rows, list[Column]]:
    """One row a layer, module kind or tensor, and a last row for all."""
    parts: Sequence[Group | TensorSparsity]
    parts = {"layer": report.layers, "module": report.kinds, "tensor": report.tensors}[by]
    rows = [_row(part) for part in (*parts, report.overall)]
    below = f"<{short(report.threshold)}"
    columns = [
        Column("label", by),
        Column("share", below, ".1%", f"share of |B·A| {below} (PAFT's measure, unscaled)"),
        Column("share_scaled", f"scaled {below}", ".1%", f"share of |s·B·A| {below}"),
        Column("expected", "Gauss", ".1%", "the scaled share that a Gaussian delta of the same rms would show"),
        Column("zeros", "zero", ".1%", "share of entries that are exactly 0"),
        Column("rms", "rms", ".1e", "root mean square of s·B·A"),
        Column("n_eff", "N_eff/N", ".3f", f"entries in use; Gaussian {GAUSSIAN.n_eff:.3f} (mean over tensors)"),
        Column("gini", "Gini", ".3f", f"0 even, 1 one entry; Gaussian {GAUSSIAN.gini:.3f} (mean over tensors)"),
        Column("d90", "d90", ".3f", f"entries that hold 90 % of the energy; Gaussian {GAUSSIAN.d90:.3f} (mean over tensors)"),
        Column("rank", "eff. rank", ".1f", "effective rank (mean over tensors)"),
        Column("relative", "/‖W‖", ".1e", "‖s·B·A‖ / ‖W‖"),
        Column("invisible", "invisible", ".1%", "share of entries that rounding to the base's type leaves as they were"),
    ]
    return rows, [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def sweep(reports: Sequence[SparsityReport]) -> tuple[Rows, list[Column]]:
    """The share of |s·δ| below each threshold; the bound is the widest of the row."""
    rows: Rows = []
    for threshold in reports[0].sweep:
        found = [report.sweep[threshold] for report in reports]
        bound = max(each.bound for each in found)
        rows.append({"threshold": short(threshold), "bound": bound} | {str(i): each.value for i, each in enumerate(found)})
    names = [Column(str(index), report.name, ".2%") for index, report in enumerate(reports)]
    return rows, [Column("threshold", "|s·δ| below"), *names, Column("bound", "±", ".2%")]


def _measures(report: SparsityReport, reports: Sequence[SparsityReport]) -> list[Line]:
    """Every measure of the summary, in order; a value of None is not known of this delta."""
    overall, moments, below = report.overall, report.overall.moments, f"< {short(report.threshold)}"
    scaled = any(tensor.scale != 1 for tensor in report.tensors)
    return [
        ("verdict", report.verdict.label, None),
        (f"|B·A| {below}, by layer", percent(report.layer_share), None),
        (f"|B·A| {below}, by entry", percent(moments.share), None),
        ("  Gaussian of that rms", percent(moments.expected / moments.entries), None),
        (f"|s·B·A| {below}, by layer", percent(report.layer_share_scaled) if scaled else None, None),
        (f"|s·B·A| {below}, by entry", percent(moments.share_scaled) if scaled else None, None),
        ("  Gaussian of that rms", percent(moments.expected_scaled / moments.entries) if scaled else None, None),
        *([("  at the first one's rms", percent(report.matched(reports[0].overall.moments.rms).value), None)]
          if len(reports) > 1 else []),
        ("exactly 0", percent(moments.zeros / moments.entries), "0.0%"),
        *_free(overall),
        ("rms of s·B·A", f"{moments.rms:.2e}", None),
        ("largest |s·B·A|", f"{moments.max:.2e}", None),
        ("Frobenius norm", f"{moments.frobenius:.3g}", None),
        ("  relative to ‖W‖", _or_none(moments.relative, ".2e"), None),
        ("L1 norm", f"{moments.l1:.3g}", None),
        ("invisible in W's type", None if moments.invisible is None else percent(moments.invisible), None),
        ("  energy of the visible", None if moments.landed is None else percent(moments.landed), None),
        ("rank, alpha", _pair(report.about, "rank", "alpha"), None),
        ("learning rate, steps", _pair(report.about, "learning_rate", "steps"), None),
        ("tensors (idle)", f"{overall.tensors} ({overall.idle})", None),
        ("entries", f"{moments.entries:,}", None),
    ]


def _free(overall: Group) -> list[Line]:
    """What rescaling leaves alone: means over tensors, then pooled."""
    moments, ranks = overall.moments, overall.ranks
    pooled = moments.scale_free()
    lines: list[Line] = [("zero rows, columns", f"{moments.zero_rows}, {moments.zero_columns}", "0, 0")]
    lines += [("dead ranks", f"{overall.dead_ranks} of {overall.all_ranks}" if overall.all_ranks else None, "0")]
    for key, label in MEANS.items():
        lines.append((label, f"{overall.means[key]:.3f}", _laws(key)))
    lines += [("N_eff/N, pooled", _or_none(pooled["n_eff"], ".3f"), _laws("n_eff"))]
    for key in ("stable_rank", "effective_rank"):
        random = _or_none(ranks.get(f"random_{key}"), ".1f")
        lines.append((key.replace('_', ' '), _or_none(ranks.get(key), ".1f"), random))
    return lines


def _pair(about: Mapping[str, Any], one: str, other: str) -> str | None:
    found = [f"{about[key]:g}" if isinstance(about.get(key), int | float) else "?" for key in (one, other)]
    return None if found == ["?", "?"] else ", ".join(found)


def _laws(key: str) -> str:
    return f"{getattr(GAUSSIAN, key):.3f}, {getattr(LAPLACE, key):.3f}"


def _or_none(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _row(part: Group | TensorSparsity) -> dict[str, Any]:
    moments: Moments = part.moments
    inside = isinstance(part, TensorSparsity)
    rank = (part.spectrum.effective if part.spectrum else None) if inside else part.ranks.get("effective_rank")
    return {
        "label": part.name if inside else part.label,
        "share": moments.share,
        "share_scaled": moments.share_scaled,
        "expected": moments.expected_scaled / moments.entries,
        "zeros": moments.zeros / moments.entries,
        "rms": moments.rms,
        "max": moments.max,
        "rank": rank,
        "relative": moments.relative,
        "invisible": moments.invisible,
        **(moments.scale_free() if inside else part.means),
    }
