"""Figures of the reports, drawn without a display; the suffix of the path chooses PNG, SVG or PDF.

This module, `maps` and `trajectory` are the only ones that load matplotlib. Colours are Okabe and Ito's, which the
colour-blind can tell apart; markers differ too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from paft.errors import UsageError
from paft.report.labels import Box, place
from paft.report.sparsity import SparsityReport
from paft.report.verdict import short

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SUFFIXES = (".png", ".svg", ".pdf")
_INK, _GRID = "#333333", "#e4e4e4"
_DASHES = (0, (4, 3))
_DPI = 160


def sparsity_figure(reports: Sequence[SparsityReport], path: str | Path) -> Path:
    """`layer_figure` into a file; raises UsageError for an unknown suffix."""
    return save(layer_figure(reports), path)


def layer_figure(reports: Sequence[SparsityReport]) -> Figure:
    """Figure 2 of the PAFT paper: the share of |B·A| below the threshold in each layer, one line an adapter.

    The dashed line of the same colour is what Gaussian tensors of the same rms would show. A share on its dashed line
    is a matter of scale (*small*); a share far above it is *sparse*. Modules outside the numbered layers are not drawn.
    """
    figure, axes = canvas((8.0, 4.8))
    entries: list[tuple[Artist, str]] = []
    for index, report in enumerate(reports):
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        layers = [(int(group.label), group.moments) for group in report.layers if group.label != "other"]
        where = [layer for layer, _ in layers]
        shares = [moments.share for _, moments in layers]
        expected = [moments.expected / moments.entries for _, moments in layers]
        # The measured line is broad and pale, so that a dashed line on it can still be seen.
        axes.plot(where, shares, color=color, alpha=0.35, lw=5, solid_capstyle="round", clip_on=False, zorder=2)
        axes.plot(where, expected, color=color, lw=1.6, ls=_DASHES, marker="_" if len(where) == 1 else None,
                  markersize=24, clip_on=False, zorder=3)  # fmt: skip
        dots = axes.plot(where, shares, color=color, marker=marker, markersize=6 if len(where) <= 16 else 4.5,
                         mec="white", mew=0.5, ls="none", clip_on=False, zorder=4)  # fmt: skip
        entries.append((dots[0], f"{shorten(report.name, 30)} ({report.verdict.label})"))
    entries.append((axes.plot([], [], color=_INK, lw=1.6, ls=_DASHES)[0], "Gaussian of equal rms"))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.margins(x=0.03)
    threshold = short(reports[0].threshold) if reports else ""
    titles(axes, f"Share of |B·A| below {threshold}, by layer", "layer", "")
    legend(figure, entries)
    return figure


def tradeoff_figure(
    points: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x: str,
    y: str,
    groups: str | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    xerr: str | None = None,
    yerr: str | None = None,
) -> Path:
    """`tradeoff` into a file; raises UsageError for an unknown suffix."""
    return save(tradeoff(points, x=x, y=y, groups=groups, title=title, xlabel=xlabel, ylabel=ylabel, xerr=xerr, yerr=yerr), path)


def tradeoff(
    points: Sequence[Mapping[str, Any]],
    *,
    x: str,
    y: str,
    groups: str | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    xerr: str | None = None,
    yerr: str | None = None,
    more: Callable[[Axes], Sequence[tuple[Artist, str]]] | None = None,
) -> Figure:
    """A scatter of named points in two metrics, each point labelled where its label hides least.

    ``points`` are rows with "name" and the fields ``x``, ``y`` and optionally ``xerr``, ``yerr`` (half-widths);
    ``groups`` names the field that chooses colour and marker. Points without both numbers are left out. ``more`` draws what
    else belongs into the axes and returns its entries of the legend. A point with "unlabelled" has no label.
    """
    figure, axes = canvas((8.0, 6.0))
    drawn = [point for point in points if point.get(x) is not None and point.get(y) is not None]
    members = list(dict.fromkeys(point.get(groups) if groups else None for point in drawn))
    entries: list[tuple[Artist, str]] = []
    for index, member in enumerate(members):
        some = [point for point in drawn if groups is None or point.get(groups) == member]
        bars = axes.errorbar(
            [point[x] for point in some],
            [point[y] for point in some],
            xerr=[point.get(xerr) or 0 for point in some] if xerr else None,
            yerr=[point.get(yerr) or 0 for point in some] if yerr else None,
            color=PALETTE[index % len(PALETTE)],
            marker=MARKERS[index % len(MARKERS)],
            ls="none", ms=8, mec="white", mew=0.8, elinewidth=1, alpha=0.95, zorder=3,
        )  # fmt: skip
        entries.append((bars.lines[0], str(member)))
    axes.margins(0.1)
    titles(axes, title, xlabel or x, ylabel or y)
    axes.grid(axis="x", color=_GRID, lw=0.8)
    entries += more(axes) if more else []
    if len(entries) > 1:
        legend(figure, entries)
    colors = [PALETTE[members.index(point.get(groups) if groups else None) % len(PALETTE)] for point in drawn]
    names = ["" if point.get("unlabelled") else str(point["name"]) for point in drawn]
    _label(figure, axes, [(name, float(point[x]), float(point[y])) for name, point in zip(names, drawn, strict=True)], colors)
    return figure


def canvas(inches: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty figure with one plain pair of axes."""
    figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(labelsize=11, colors=_INK)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, lw=0.8)


def legend(figure: Figure, entries: Sequence[tuple[Artist, str]]) -> None:
    """Below the axes, so that long names do not squeeze them; names are shown as they are, dollar signs included."""
    handles, names = [handle for handle, _ in entries], [shorten(name) for _, name in entries]
    columns = 2 if max(map(len, names)) > 24 else 4
    box = figure.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=10.5,
                           labelcolor=_INK, handletextpad=0.5, columnspacing=1.6)  # fmt: skip
    for text in box.get_texts():
        text.set_parse_math(False)


def shorten(name: str, most: int = 40) -> str:
    """Cut the middle out of a long name: adapters of one family differ at the ends."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def titles(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
    axes.set_xlabel(xlabel, fontsize=12, color=_INK)
    axes.set_ylabel(ylabel, fontsize=12, color=_INK)


def _label(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]], colors: Sequence[str]) -> None:
    """Write each name where `place` puts it; one that had to move away gets a thin line to its point."""
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    halo = [withStroke(linewidth=2.5, foreground="white")]
    texts = [axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=10, color=_INK, zorder=5,
                           parse_math=False, path_effects=halo) for name, x, y in points]  # fmt: skip
    extents = [text.get_window_extent() for text in texts]
    sizes = [(extent.width / unit, extent.height / unit) for extent in extents]
    where = [tuple(axes.transData.transform((x, y)) / unit) for _, x, y in points]
    edge = Box(*(float(side) / unit for side in axes.get_window_extent().extents))
    for text, spot, size, color in zip(texts, place(where, sizes, edge), sizes, colors, strict=True):
        text.set_position((spot.dx, spot.dy))
        text.set_in_layout(False)
        if spot.far:
            near = (min(max(0.0, spot.dx), spot.dx + size[0]), min(max(0.0, spot.dy), spot.dy + size[1]))
            stroke = {"arrowstyle": "-", "color": color, "lw": 0.9, "shrinkA": 0, "shrinkB": 3}
            line = axes.annotate("", text.xy, xytext=near, textcoords="offset points", zorder=2, arrowprops=stroke)
            line.set_in_layout(False)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; raises UsageError for an unknown suffix."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} is not a figure's name", hint="end it in .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    figure.savefig(path, facecolor="white", metadata=metadata)
    return path
