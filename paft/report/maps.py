"""The other figures of the reports: where |δ| lies, layer by module, how two deltas meet; and any figure as text for a page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from paft.report.interference import Interference
from paft.report.plots import MARKERS, PALETTE, canvas, legend, plain, save, shorten, titles
from paft.report.sparsity import SparsityReport
from paft.report.verdict import percent, short

_INK = "#333333"
_DASHES = (0, (4, 3))
_TITLES = ("Cosine", "Energy in entries of opposite sign", "Overlap of the largest entries")
_PARTS = 4  # bins an octave
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as the data flow; others follow


def histogram_figure(reports: Sequence[SparsityReport]) -> Figure:
    """Where |s·δ| lies: share of the entries per decade, on a log axis, with the Gaussian of the same rms dashed.

    On this axis rescaling moves a curve sideways and does not change its shape; the threshold stands still.
    """
    figure, axes = canvas((8.0, 4.8))
    entries: list[tuple[Artist, str]] = []
    ends: list[float] = []
    for index, report in enumerate(reports):
        color, moments = PALETTE[index % len(PALETTE)], report.overall.moments
        lower, counts = moments.histogram.octaves(_PARTS)
        if not len(lower):
            continue
        upper = lower + 2.0 ** np.floor(np.log2(lower)) / _PARTS  # bins of one octave have one width
        line = axes.plot(np.sqrt(lower * upper), counts / moments.entries / np.log10(upper / lower), color=color, lw=2.2)[0]
        x = moments.rms * np.logspace(-5, 1, 300)
        law = np.sqrt(2 / np.pi) * x / moments.rms * np.exp(-((x / moments.rms) ** 2) / 2) * math.log(10)
        axes.plot(x, law, color=color, lw=1.4, ls=_DASHES)
        ends += [moments.rms * 1e-4, moments.max * 2]
        zeros = f", {percent(moments.zeros / moments.entries)} are 0" if moments.zeros else ""
        entries.append((line, f"{shorten(report.name, 30)} ({report.verdict.label}{zeros})"))
    axes.set_xscale("log")
    if ends:
        axes.set_xlim(min(ends), max(ends))
        axes.axvline(reports[0].threshold, color=_INK, lw=1)
        entries.append((axes.plot([], [], color=_INK, lw=1)[0], f"threshold {short(reports[0].threshold)}"))
        entries.append((axes.plot([], [], color=_INK, lw=1.4, ls=_DASHES)[0], "Gaussian of equal rms"))
    axes.set_ylim(bottom=0)
    titles(axes, "Where |s·δ| lies", "|s·δ|", "share of entries per decade")
    legend(figure, entries)
    return figure


def sparsity_map(report: SparsityReport) -> Figure:
    """Layer by module: PAFT's share on the left, what does not depend on the scale on the right."""
    cells = [(tensor.layer, tensor.kind, tensor.moments) for tensor in report.tensors]
    share = {(layer, kind): moments.share for layer, kind, moments in cells}
    used = {(layer, kind): moments.n_eff or 0.0 for layer, kind, moments in cells}
    below = f"share of |B·A| < {short(report.threshold)}"
    return _maps([(below, share, (0.0, 1.0), "viridis"), ("N_eff/N (Gaussian 0.637)", used, (0.0, 0.7), "viridis")], report.name)


def interference_map(found: Interference) -> Figure:
    """Layer by module: the cosine of the two, and the overlap of their largest entries."""
    def key(label: str) -> tuple[int | None, str]:
        layer = next((int(part) for part in label.split(".") if part.isdecimal()), None)
        return layer, label.removesuffix(".weight").rpartition(".")[2]

    cosine = {key(clash.label): clash.cosine for clash in found.tensors}
    overlap = {key(clash.label): clash.to_dict()["overlap"] for clash in found.tensors}
    most = max(0.05, max(abs(value) for value in cosine.values()))
    named = f"overlap of the largest {found.density:g} (chance {found.density:g})"
    return _maps([("cosine", cosine, (-most, most), "RdBu"), (named, overlap, (0.0, max(2 * found.density, 0.01)), "viridis")],
                 " and ".join(found.names))


def interference_figure(found: Sequence[Interference], path: str | Path) -> Path:
    """`clash_figure` into a file; raises UsageError for an unknown suffix."""
    return save(clash_figure(found), path)


def clash_figure(found: Sequence[Interference]) -> Figure:
    """By layer: cosine, energy in conflict, and overlap of the largest entries; the dashed line is chance."""
    figure = Figure(figsize=(8.0, 7.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    entries: list[tuple[Artist, str]] = []
    for index, pair in enumerate(found):
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        layers = [clash for clash in pair.layers if clash.label != "other"]
        where = [int(clash.label) for clash in layers]
        data = [clash.to_dict() for clash in layers]
        for axes, key in zip(panels, ("cosine", "energy_in_conflict", "overlap"), strict=True):
            chance = [0.0] * len(data) if key == "cosine" else [one[f"{key}_chance"] for one in data]
            line = axes.plot(where, [one[key] for one in data], color=color, marker=marker, ms=5, lw=1.8)[0]
            axes.plot(where, chance, color=color, lw=1.2, ls=_DASHES)
        entries.append((line, " and ".join(shorten(name, 24) for name in pair.names)))
    for axes, title in zip(panels, _TITLES, strict=True):
        plain(axes)
        titles(axes, title, "", "")
        axes.margins(x=0.03, y=0.15)
    panels[0].axhline(0, color=_INK, lw=0.8)
    for axes in panels[1:]:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    panels[-1].set_xlabel("layer", fontsize=12, color=_INK)
    entries.append((panels[0].plot([], [], color=_INK, lw=1.2, ls=_DASHES)[0], "chance"))
    legend(figure, entries)
    return figure


Panel = tuple[str, dict[tuple[int | None, str], float], tuple[float, float], str]


def _maps(panels: Sequence[Panel], name: str) -> Figure:
    """Heat maps side by side: layers down, modules across; what the delta does not hold stays white."""
    found = dict.fromkeys(kind for layer, kind in panels[0][1] if layer is not None)
    kinds = sorted(found, key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER))
    layers = sorted({layer for layer, _ in panels[0][1] if layer is not None})
    figure = Figure(figsize=(8.0, max(2.6, min(9.0, 1.9 + 0.17 * len(layers)))), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, values, (low, high), colors) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        grid = np.array([[values.get((layer, kind), math.nan) for kind in kinds] for layer in layers], dtype=float)
        if grid.size:
            mesh = axes.pcolormesh(np.arange(len(kinds) + 1) - 0.5, np.arange(len(layers) + 1) - 0.5, grid, cmap=colors,
                                   vmin=low, vmax=high, edgecolors="white", linewidth=0.4,
                                   rasterized=True)  # hundreds of paths in an SVG otherwise
            figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=9)
        axes.set_xticks(range(len(kinds)), [shorten(kind, 14) for kind in kinds], rotation=60, ha="right", fontsize=9,
                        parse_math=False)
        step = max(1, len(layers) // 16)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=9)
        axes.invert_yaxis()
        axes.set_ylabel("layer", fontsize=10, color=_INK)
        axes.set_title(title, fontsize=11, color=_INK)
        axes.spines[:].set_visible(False)
    figure.suptitle(shorten(name, 60), fontsize=12, fontweight="bold", color=_INK, parse_math=False)
    return figure


def as_svg(figure: Figure, salt: str) -> str:
    """A figure as an <svg> element for a page, where its ids are unique by ``salt``; letters are shapes."""
    text: Any = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    body = re.sub(r"\s*\n\s*", " ", body[body.index("<svg") :])
    body = re.sub(r'base64,[^"]*', lambda found: found[0].replace(" ", ""), body)
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{salt}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\1#{salt}-", body)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt" width="[\d.]+pt"', "", body, count=1)
