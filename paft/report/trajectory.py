"""Figures in the objective space: the ways of trainings and where methods end, with the front, the ideal point and the costs.

What Figures 3, 4, 7 and 8 of ALRIGHT / MAXRIGHT (arXiv 2410.15483) show: trajectories of (f_SFT, f_DPO) on held-out rows, one
marker an evaluation, and bars of ideal distance, runtime and memory. A strip shows which objective each step has taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from paft.report.headtohead import front
from paft.report.plots import MARKERS, PALETTE, canvas, legend, plain, shorten, titles, tradeoff
from paft.report.seeds import COMBINED
from paft.report.trainings import Group, Point
from paft.report.ways import Way

_INK, _GRID, _PALE, _STAR = "#333333", "#e4e4e4", "#c4c4c4", "#E6B800"
_MANY = (*PALETTE, "#882255", "#44AA99", "#999933")  # Okabe and Ito's do not suffice
_TAKEN = {"D": ("DPO", "#333333"), "S": ("SFT", "#d9d9d9"), "B": ("both", "#8c8c8c")}
_BARS = (("ideal", "ideal distance (nats)", ""), ("seconds", "training time (s)", "runtime_pct"),
         ("memory_mb", "peak memory (MB)", "memory_pct"))
_LABELS, _FEW = 32, 8  # more names hide each other
_WIDE = 12.0  # largest over smallest loss from which an axis is logarithmic


def training_figure(groups: Sequence[Group]) -> Figure:
    """The trajectories, the objective of each step, and the costs, one colour a method and one marker a λ of it."""
    strips = [(group.label, group.members[0].chosen) for group in groups if group.members[0].chosen]
    drawn, styles = [group for group in groups if any(one.points for one in group.members)], _styles(groups)
    rows = [5.2 if drawn else 0.0, 0.5 + 0.26 * len(strips) if strips else 0.0, 0.8 + 0.3 * len(groups)]
    figure = Figure(figsize=(8.0, sum(rows) + 1.1), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr]
    parts = iter(figure.add_gridspec(sum(map(bool, rows)), 1, height_ratios=[row for row in rows if row]))
    entries: list[tuple[Artist, str]] = []
    if drawn:
        entries = _trajectories(_axes(figure, next(parts)), groups, styles)
    if strips:
        _strip(_axes(figure, next(parts)), strips)
    _bars(figure, next(parts), [(group.label, group.row, color) for group, (color, _) in zip(groups, styles, strict=True)])
    if entries:
        legend(figure, entries)
    return figure


def study_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Where the rows of several seeds end, mean ± standard error, with the front and the ideal point of the means."""
    shown = [row for row in rows if {"sft_loss", "dpo_loss"} <= row.keys()]
    ends = [(row["sft_loss"], row["dpo_loss"]) for row in shown]
    ideal = {(min(x for x, _ in ends), min(y for _, y in ends))} if ends else set()

    def more(axes: Axes) -> list[tuple[Artist, str]]:
        _scale(axes, ends)
        return _front_and_ideal(axes, ends, ideal)

    if len(shown) > _LABELS:  # then those that make the picture: the front, small groups, and the nearest of large ones
        groups = [sorted((row for row in shown if row["group"] == group), key=lambda row: row["ideal"])
                  for group in dict.fromkeys(row["group"] for row in shown)]
        named = [row["name"] for group in groups for row in (group if len(group) <= _FEW else group[:2])]
        best = front(ends)
        named += [row["name"] for row in shown if (row["sft_loss"], row["dpo_loss"]) in best]
        shown = [{**row, "unlabelled": row["name"] not in named} for row in shown]
    several = shown and shown[0]["runs"] > 1
    xerr, yerr = ("sft_loss_se", "dpo_loss_se") if several else (None, None)
    return tradeoff(shown, x="sft_loss", y="dpo_loss", groups="group", title=title, xerr=xerr, yerr=yerr,
                    xlabel="held-out SFT loss (nats a token)", ylabel="held-out DPO loss (nats)", more=more)


def ways_figure(rows: Sequence[Mapping[str, Any]], ways: Sequence[Way], title: str) -> Figure:
    """The way of each method, one colour a method, among the ends of all rows: front and ideal point are those of the ends.

    A large marker is the row of the table; where the way was measured on other rows, a dotted line leads from its end to that.
    """
    figure, axes = canvas((8.0, 6.0))
    places = {row["id"]: (row["sft_loss"], row["dpo_loss"]) for row in rows if {"sft_loss", "dpo_loss"} <= row.keys()}
    others = [row for row in rows if row["id"] in places and row["id"] not in ("base", *(way.row for way in ways))]
    entries: list[tuple[Artist, str]] = []
    for index, group in enumerate(dict.fromkeys(row["group"] for row in others)):
        points = [places[row["id"]] for row in others if row["group"] == group]
        dots = axes.plot(*zip(*points, strict=True), color=_PALE, marker=MARKERS[index % len(MARKERS)], ms=6, ls="none",
                         zorder=2)[0]
        entries.append((dots, str(group)))
    names = {row["id"]: str(row["name"]) for row in rows}
    for index, way in enumerate(ways):
        color, marker = _MANY[index % len(_MANY)], MARKERS[index % len(MARKERS)]
        axes.plot(*zip(*way.points, strict=True), color=color, lw=1.4, alpha=0.75, marker=marker, ms=4, mec="none", zorder=3)
        axes.plot(*zip(way.points[-1], places[way.row], strict=True), color=color, lw=1.2, ls=":", zorder=3)
        end = axes.plot(*places[way.row], color=color, marker=marker, ms=10, mec=_INK, mew=0.8, ls="none", zorder=5)[0]
        entries.append((end, shorten(names[way.row], 24)))
    if start := places.get("base"):
        entries.append((axes.plot(*start, color="white", marker="o", ms=8, mec=_INK, mew=1.2, ls="none", zorder=4)[0], "base"))
    ends = list(places.values())
    entries += _front_and_ideal(axes, ends, {(min(x for x, _ in ends), min(y for _, y in ends))})
    _scale(axes, [*ends, *(point for way in ways for point in way.points)])
    titles(axes, title, "held-out SFT loss (nats a token)", "held-out DPO loss (nats)")
    legend(figure, entries)
    return figure


def cost_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of ideal distance, training time and memory of the ways to combine both objectives, a colour a group."""
    shown = [row for row in rows if row["group"] in COMBINED]
    members = list(dict.fromkeys(row["group"] for row in rows))
    styles = [(str(row["name"]), row, PALETTE[members.index(row["group"]) % len(PALETTE)]) for row in shown]
    figure = Figure(figsize=(8.0, 1.0 + 0.26 * len(styles)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    _bars(figure, figure.add_gridspec(1, 1)[0], styles)
    return figure


def _axes(figure: Figure, part: Any) -> Axes:
    axes = figure.add_subplot(part)
    plain(axes)
    return axes


def _styles(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(colour, marker) of each row; where each method has one row, the markers differ as the colours do."""
    methods = [group.members[0].title for group in groups]
    order, found = list(dict.fromkeys(methods)), []
    for index, method in enumerate(methods):
        nth = methods[:index].count(method) if len(order) < len(groups) else index
        found.append((_MANY[order.index(method) % len(_MANY)], MARKERS[nth % len(MARKERS)]))
    return found


def _trajectories(axes: Axes, groups: Sequence[Group], styles: Sequence[tuple[str, str]]) -> list[tuple[Artist, str]]:
    entries: list[tuple[Artist, str]] = []
    for group, (color, marker) in zip(groups, styles, strict=True):
        for one in (one for one in group.members if one.points):
            x, y = zip(*one.points, strict=True)
            way = axes.plot(x, y, color=color, lw=1.3, alpha=0.6, marker=marker, ms=4, mec="none", zorder=3)[0]
            axes.plot(x[:1], y[:1], color="white", marker="o", ms=8, mec=_INK, mew=1.2, ls="none", zorder=4)
            if one.last:
                way = axes.plot(*one.last, color=color, marker=marker, ms=10, mec=_INK, mew=1, ls="none", zorder=5)[0]
        if any(one.points for one in group.members):
            entries.append((way, shorten(group.label, 24)))
    ends = [one.last for group in groups for one in group.members if one.last]
    ideals = {(aim.sft, aim.dpo) for group in groups for aim in group.aims if aim}
    every = [point for group in groups for one in group.members for point in one.points] + list(ideals)
    entries += [(axes.plot([], [], color="white", marker="o", ms=8, mec=_INK, mew=1.2, ls="none")[0], "start"),
                *_front_and_ideal(axes, ends, ideals)]
    _scale(axes, every)
    titles(axes, "Training trajectories", "held-out SFT loss (nats a token)", "held-out DPO loss (nats)")
    return entries


def _front_and_ideal(axes: Axes, ends: Sequence[Point], ideals: set[Point]) -> list[tuple[Artist, str]]:
    found: list[tuple[Artist, str]] = []
    if len(best := front(ends)) > 1:
        line = axes.plot(*zip(*best, strict=True), color=_INK, lw=1, ls=(0, (4, 3)), zorder=2)[0]
        found.append((line, "front of the ends"))
    if ideals:
        star = axes.plot(*zip(*ideals, strict=True), color=_STAR, marker="*", ms=15, mec=_INK, mew=0.8, ls="none", zorder=6)[0]
        found.append((star, "ideal point"))
    return found


def _scale(axes: Axes, points: Sequence[Point]) -> None:
    """Logarithmic where the losses are far apart: the first steps would hide the rest."""
    axes.grid(axis="x", color=_GRID, lw=0.8)
    axes.margins(0.06)
    for axis, values in ((axes.xaxis, [x for x, _ in points]), (axes.yaxis, [y for _, y in points])):
        if values and min(values) > 0 and max(values) / min(values) > _WIDE:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _strip(axes: Axes, strips: Sequence[tuple[str, str]]) -> None:
    """Which objective each step has taken, one row a training; where steps are narrower than a pixel, their mean grey."""
    steps = max(len(chosen) for _, chosen in strips)
    colors = list(_TAKEN)
    for index, (_, chosen) in enumerate(strips):
        grid = np.array([[colors.index(letter) for letter in chosen]])
        axes.imshow(grid, cmap=ListedColormap([color for _, color in _TAKEN.values()]), vmin=0, vmax=len(colors) - 1,
                    aspect="auto", extent=(0, len(chosen), index + 0.38, index - 0.38), interpolation_stage="rgba")
    axes.set_xlim(0, steps)
    axes.set_ylim(len(strips) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_yticks(range(len(strips)), [shorten(name, 22) for name, _ in strips], fontsize=9.5, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    titles(axes, "Objective of each step", "optimiser step", "")
    seen = "".join(chosen for _, chosen in strips)
    patches = [Patch(facecolor=color, label=name) for letter, (name, color) in _TAKEN.items() if letter in seen]
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=10, borderpad=0)


def _bars(figure: Figure, part: Any, styles: Sequence[tuple[str, Mapping[str, Any], str]]) -> None:
    """One panel a cost: a bar a row, its error, and what it is beside the sequential row."""
    shown = [bar for bar in _BARS if any(bar[0] in row for _, row, _ in styles)]
    first: Axes | None = None
    for place, (key, title, relative) in zip(part.subgridspec(1, max(1, len(shown))), shown, strict=False):
        axes = figure.add_subplot(place, sharey=first)
        first = first or axes
        plain(axes)
        axes.grid(visible=False)
        values = [row.get(key, math.nan) for _, row, _ in styles]
        errors = [0.0 if math.isnan(row.get(f"{key}_se", math.nan)) else row[f"{key}_se"] for _, row, _ in styles]
        axes.barh(range(len(styles)), values, color=[color for *_, color in styles], height=0.7, zorder=2,
                  xerr=errors if any(errors) else None, error_kw={"lw": 1, "ecolor": _INK})
        ends = [0.0 if math.isnan(value) else value + error for value, error in zip(values, errors, strict=True)]
        for index, ((_, row, _), value, end) in enumerate(zip(styles, values, ends, strict=True)):
            text = "" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
            text += f" ({row[relative]:+.0f} %)" if relative in row else ""
            axes.annotate(text, (end, index), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8.5, color=_INK)
        axes.set_xlim(0, max(ends) * 1.75 or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="x", labelsize=9)
        axes.tick_params(axis="y", length=0, labelleft=axes is first)
        axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    if first:
        first.set_yticks(range(len(styles)), [shorten(name, 22) for name, *_ in styles], fontsize=9.5, parse_math=False)
        first.set_ylim(len(styles) - 0.4, -0.6)
