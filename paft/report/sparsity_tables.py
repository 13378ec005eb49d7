"""A sparsity report as rows and columns: some adapters side by side, or one by layer, module kind or tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from paft.report.moments import GAUSSIAN_HOYER, GAUSSIAN_N_EFF, Moments
from paft.report.render import Column
from paft.report.sparsity import Group, SparsityReport, TensorSparsity, short

By = Literal["layer", "module", "tensor"]
Rows = list[dict[str, Any]]


def summary(reports: Sequence[SparsityReport]) -> tuple[Rows, list[Column]]:
    """One row a measure, one column an adapter, and what a dense Gaussian delta shows.

    The Gaussian value of a share depends on the rms, so it is a row below the share; where it equals the share, the
    share says how large the delta is and nothing else.
    """
    columns = [_measures(report) for report in reports]
    rows: Rows = []
    for index, (label, gaussian, _) in enumerate(columns[0]):
        values = {str(adapter): measures[index][2] for adapter, measures in enumerate(columns)}
        rows.append({"measure": label, "gaussian": gaussian} | values)
    adapters = [Column(str(index), report.name) for index, report in enumerate(reports)]
    return rows, [Column("measure", "measure"), *adapters, Column("gaussian", "Gaussian")]


def breakdown(report: SparsityReport, by: By = "layer") -> tuple[Rows, list[Column]]:
    """One row a layer, module kind or tensor, and a last row for all."""
    parts: Sequence[Group | TensorSparsity]
    parts = {"layer": report.layers, "module": report.kinds, "tensor": report.tensors}[by]
    rows = [_row(part) for part in (*parts, report.overall)]
    below = f"<{short(report.threshold)}"
    return rows, [
        Column("label", by),
        Column("share", below, ".1%", f"share of |B·A| {below} (PAFT's measure, unscaled)"),
        Column("share_scaled", f"scaled {below}", ".1%", f"share of |s·B·A| {below}"),
        Column("expected", "Gauss", ".1%", "the scaled share that a Gaussian delta of the same rms would show"),
        Column("zeros", "zero", ".1%", "share of entries that are exactly 0"),
        Column("rms", "rms", ".1e", "root mean square of s·B·A"),
        Column("max", "max", ".1e", "largest |s·B·A|"),
        Column("hoyer", "Hoyer", ".3f", f"0 even, 1 one entry; Gaussian {GAUSSIAN_HOYER:.3f} (mean over tensors)"),
        Column("n_eff", "N_eff/N", ".3f", f"entries in use; Gaussian {GAUSSIAN_N_EFF:.3f} (mean over tensors)"),
    ]


def _measures(report: SparsityReport) -> list[tuple[str, str | None, str | None]]:
    """(label, value of a Gaussian, value) of every measure of the summary, in order."""
    overall, moments, below = report.overall, report.overall.moments, f"< {short(report.threshold)}"
    hoyer, n_eff = f"{GAUSSIAN_HOYER:.3f}", f"{GAUSSIAN_N_EFF:.3f}"
    return [
        ("verdict", None, report.verdict.word),
        (f"|B·A| {below}, mean of layers", None, f"{report.layer_share:.1%}"),
        (f"|B·A| {below}, all entries", None, f"{moments.share:.1%}"),
        ("  Gaussian of equal rms", None, f"{moments.expected / moments.entries:.1%}"),
        (f"|s·B·A| {below}, mean of layers", None, f"{report.layer_share_scaled:.1%}"),
        (f"|s·B·A| {below}, all entries", None, f"{moments.share_scaled:.1%}"),
        ("  Gaussian of equal rms", None, f"{moments.expected_scaled / moments.entries:.1%}"),
        ("exactly 0", "0.0%", f"{moments.zeros / moments.entries:.1%}"),
        ("Hoyer, mean over tensors", hoyer, f"{overall.hoyer_mean:.3f}"),
        ("N_eff/N, mean over tensors", n_eff, f"{overall.n_eff_mean:.3f}"),
        ("Hoyer, all entries pooled", hoyer, None if moments.hoyer is None else f"{moments.hoyer:.3f}"),
        ("N_eff/N, all entries pooled", n_eff, None if moments.n_eff is None else f"{moments.n_eff:.3f}"),
        ("rms of s·B·A", None, f"{moments.rms:.2e}"),
        ("largest |s·B·A|", None, f"{moments.max:.2e}"),
        ("Frobenius norm", None, f"{moments.frobenius:.3g}"),
        ("L1 norm", None, f"{moments.l1:.3g}"),
        ("tensors (idle)", None, f"{overall.tensors} ({overall.idle})"),
        ("entries", None, f"{moments.entries:,}"),
    ]


def _row(part: Group | TensorSparsity) -> dict[str, Any]:
    moments: Moments = part.moments
    inside = isinstance(part, TensorSparsity)
    return {
        "label": part.name if inside else part.label,
        "share": moments.share,
        "share_scaled": moments.share_scaled,
        "expected": moments.expected_scaled / moments.entries,
        "zeros": moments.zeros / moments.entries,
        "rms": moments.rms,
        "max": moments.max,
        "hoyer": moments.hoyer if inside else part.hoyer_mean,
        "n_eff": moments.n_eff if inside else part.n_eff_mean,
    }
