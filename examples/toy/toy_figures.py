"""The two pictures of the toy problems, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

DPO, SFT, PATH, GREY = "#0072B2", "#D55E00", "#222222", "#8a8a8a"  # Okabe and Ito's
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")
BOTH = "#d9efe4"
LEVELS = (0.05, 0.25, 1, 2, 4, 6)
DPI = 110


def loss(objective: Any, *theta: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, objective.offset - sum(a * x for a, x in zip(objective.slope, theta, strict=True)))


def save(figure: Figure, file: Path) -> None:
    """As PNG of 256 colours, half the size."""
    scratch = BytesIO()
    figure.savefig(scratch, dpi=DPI)
    Image.open(scratch).convert("RGB").quantize(256).save(file, optimize=True)


def trace(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """The path, its start and its end."""
    axes.plot(x, y, color=PATH, lw=1.6, zorder=4)
    axes.plot(x[0], y[0], "o", ms=8, color="white", mec=PATH, mew=1.5, zorder=5)
    axes.plot(x[-1], y[-1], "X", ms=11, color=PATH, mec="white", mew=1.0, zorder=6)


def weights_panel(axes: Axes, objectives: Mapping[str, Any], path: np.ndarray) -> None:
    grid = np.meshgrid(np.linspace(-8, 13, 200), np.linspace(-12, 14, 200))
    fields = {name: loss(objective, *grid) for name, objective in objectives.items()}
    both = np.where(np.maximum(*fields.values()) <= 0.25, 1.0, np.nan)
    axes.pcolormesh(*grid, both, cmap=ListedColormap([BOTH]), shading="auto", rasterized=True)
    for name, color in (("dpo", DPO), ("sft", SFT)):
        lines = axes.contour(*grid, fields[name], levels=LEVELS, colors=color, linewidths=0.9, alpha=0.75)
        # SFT's lines stand upright: their labels in a row near the top, below DPO's.
        row = [(-math.log(math.expm1(level)) / objectives[name].slope[0], 12.0) for level in LEVELS]
        axes.clabel(lines, fmt="%g", fontsize=8, manual=row if name == "sft" else False)
    trace(axes, path[:, 0], path[:, 1])
    axes.set(xlim=(-8, 13), ylim=(-12, 14), xlabel="θ₁")


def losses_panel(axes: Axes, objectives: Mapping[str, Any], path: np.ndarray) -> None:
    x, y = (loss(objectives[name], path[:, 0], path[:, 1]) for name in ("dpo", "sft"))
    axes.plot([0, x[-1]], [0, y[-1]], color=GREY, lw=1.2, ls="--", zorder=3)
    trace(axes, x, y)
    axes.plot(0, 0, "*", ms=16, color="#009E73", mec="white", zorder=7, clip_on=False)
    axes.text(0.97, 0.95, f"ends at ({x[-1]:.2f}, {y[-1]:.2f}),\n{math.hypot(x[-1], y[-1]):.2f} from the ideal point",
              transform=axes.transAxes, ha="right", va="top", fontsize=10)  # fmt: skip
    axes.set(xlim=(-0.15, 5.8), ylim=(-0.15, 6.2), xlabel="f_DPO")
    axes.grid(color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)


def figure2(objectives: Mapping[str, Any], paths: Mapping[str, Sequence[tuple[float, ...]]], file: Path) -> None:
    """Weight space above, loss space below; sequential, ALRIGHT, MAXRIGHT from left to right."""
    figure = Figure(figsize=(11.0, 7.2), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for column, name in enumerate(("Sequential", "ALRIGHT", "MAXRIGHT")):
        path = np.asarray(paths[name])
        weights_panel(axes[0, column], objectives, path)
        losses_panel(axes[1, column], objectives, path)
        axes[0, column].set_title({"Sequential": "Sequential: DPO, then SFT"}.get(name, name), fontsize=12)
    axes[0, 0].set_ylabel("θ₂")
    axes[1, 0].set_ylabel("f_SFT")
    handles = [axes[0, 0].plot([], [], color=DPO, label="f_DPO")[0], axes[0, 0].plot([], [], color=SFT, label="f_SFT")[0],
               axes[0, 0].plot([], [], "s", ms=10, color=BOTH, label="both ≤ 0.25")[0],
               axes[0, 0].plot([], [], "o", color="white", mec=PATH, label="start")[0],
               axes[0, 0].plot([], [], "X", ms=9, color=PATH, label="end")[0],
               axes[0, 0].plot([], [], "*", ms=13, color="#009E73", label="ideal point")[0]]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    save(figure, file)


def theorem33(objectives: Mapping[str, Any], table: Mapping[float, Sequence[tuple[float, float]]], budgets: Sequence[int],
              file: Path) -> None:  # fmt: skip
    """The objectives of Table 2, and how the gap of the last iterate moves with the budget."""
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    theta = np.linspace(-25, 15, 300)
    for name, color in (("dpo", DPO), ("sft", SFT)):
        left.plot(theta, loss(objectives[name], theta), color=color, lw=2, label=f"f_{name.upper()}")
    mixed = sum(loss(objective, theta) for objective in objectives.values()) / 2
    left.plot(theta, mixed, color=PATH, lw=2, label="f_Mix, λ = 0.5")
    left.set(xlabel="θ", title="Objectives of Table 2")
    left.legend(frameon=False)
    for color, (lam, row) in zip(COLORS, table.items(), strict=False):
        sequential, alright = zip(*row, strict=True)
        right.loglog(budgets, sequential, "s--", color=color, lw=1.6)
        right.loglog(budgets, alright, "o-", color=color, lw=1.6, label=f"λ = {lam}")
    right.plot([], [], "s--", color=GREY, label="sequential")
    right.plot([], [], "o-", color=GREY, label="ALRIGHT")
    right.set(xlabel="steps T", title="Gap of the mixed objective at the end, G_Mix,λ")
    right.legend(frameon=False, ncols=2, fontsize=9, loc="lower left")
    for axes in (left, right):
        axes.grid(color="#e4e4e4", lw=0.8)
        axes.set_axisbelow(True)
    save(figure, file)
