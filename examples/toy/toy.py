"""The toy problems of ALRIGHT / MAXRIGHT (arXiv 2410.15483): Figure 2 and Theorem 3.3, trained by paft's own schedules.

    python examples/toy/toy.py [-o DIR]          half a minute: prints two tables, writes figure2.png and theorem33.png

A softmax policy over two answers, π_θ(y|x) ∝ exp(θᵀφ_{y,x}), makes both objectives logistic losses of one margin:

    f_SFT(θ) = log(1 + exp(−(φ_y − φ_y')ᵀθ))
    f_DPO(θ) = log(1 + exp(−β·(φ_w − φ_l)ᵀ(θ − θ_ref)))        eq. 22; π_ref has the parameter θ_ref

Their infimum is 0, which no θ reaches, so f* = 0 and a loss is its own gap. Each data set has one row: an epoch is one step.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from operator import mul
from pathlib import Path

from paft.train.gaps import Gaps
from paft.train.schedules import Alright, Maxright, Mix, Schedule, Sequential

Point = tuple[float, ...]
START, LR, DECAY, THRESHOLD = (5.0, -9.9), 0.01, 0.001, 0.05  # Appendix D.1
REFERENCE_STEPS, STEPS = 1_000, 20_000  # sequential: 10,000 for each objective


@dataclass(frozen=True)
class Objective:
    """f(θ) = log(1 + exp(−m)) of the margin m = slopeᵀθ − offset."""

    slope: Point
    offset: float = 0.0

    def margin(self, theta: Point) -> float:
        return sum(map(mul, self.slope, theta)) - self.offset

    def value(self, theta: Point) -> float:
        margin = self.margin(theta)
        return math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)

    def gradient(self, theta: Point) -> Point:
        """−σ(−m)·slope"""
        margin = self.margin(theta)
        miss = 1.0 / (1.0 + math.exp(margin)) if margin < 0 else math.exp(-margin) / (1.0 + math.exp(-margin))
        return tuple([-miss * a for a in self.slope])


Objectives = Mapping[str, Objective]


def sft(target: Point, other: Point) -> Objective:
    return Objective(tuple(a - b for a, b in zip(target, other, strict=True)))


def dpo(chosen: Point, rejected: Point, reference: Point, beta: float = 1.0) -> Objective:
    slope = tuple(beta * (a - b) for a, b in zip(chosen, rejected, strict=True))
    return Objective(slope, Objective(slope).margin(reference))


def descend(theta: Point, gradients: list[tuple[float, Point]], lr: float, decay: float) -> Point:
    """A step of gradient descent on the weighted sum, with weight decay."""
    return tuple([x - lr * (sum([w * g[i] for w, g in gradients]) + decay * x) for i, x in enumerate(theta)])


def train(
    objectives: Objectives, schedule: Schedule, start: Point, lr: float, decay: float = 0.0, stop: float = 0.0
) -> list[Point]:
    """θ before each step and after the last one; an objective at ``stop`` or below is not trained, nor is θ decayed for it."""
    gaps = Gaps(dict.fromkeys(objectives, 0.0))
    path = [start]
    for step in range(schedule.steps):
        theta = path[-1]
        if schedule.due(step):
            gaps.see({name: objective.value(theta) for name, objective in objectives.items()})
        weights = schedule(step, gaps.now)
        losses = {name: objectives[name].value(theta) for name in weights}
        gaps.see(losses)
        live = [(weight, objectives[name].gradient(theta)) for name, weight in weights.items() if losses[name] > stop]
        path.append(descend(theta, live, lr, decay) if live else theta)
    return path


def reference(chosen: Point, rejected: Point, steps: int = REFERENCE_STEPS) -> Point:
    """θ_ref: the start, trained on {(x_1, y_w)}."""
    objective, theta = sft(chosen, rejected), START
    for _ in range(steps):
        theta = descend(theta, [(1.0, objective.gradient(theta))], LR, DECAY)
    return theta


def problem(chosen: Point, rejected: Point, target: Point, other: Point, beta: float = 1.0) -> Objectives:
    return {"dpo": dpo(chosen, rejected, reference(chosen, rejected), beta), "sft": sft(target, other)}


def readings() -> dict[str, Objectives]:
    """Table 3 to the letter, and what Figure 2 may have been drawn from (README.md)."""
    one, half, first = (1.0, 1.0), (0.5, 0.5), (1.0, 0.5)
    negated = (-1.0, -1.0), (-0.5, -0.5)
    return {
        "to the letter": problem(one, half, first, half),
        "φ of x_1 negated": problem(*negated, first, half),
        "y and y' exchanged": problem(one, half, half, first),
        "the same, β = 0.1": problem(one, half, half, first, beta=0.1),
    }


FIGURE = "y and y' exchanged"


def schedules(lam: float = 0.5, steps: int = STEPS, seed: int = 0) -> dict[str, Schedule]:
    return {
        "Sequential": Sequential(lam, steps),
        "ALRIGHT": Alright(lam, steps, seed),
        "MAXRIGHT": Maxright(lam, steps, every=1),
        "Mix": Mix(lam, steps),
    }


def losses(objectives: Objectives, theta: Point) -> Point:
    return objectives["dpo"].value(theta), objectives["sft"].value(theta)


def trajectories(objectives: Objectives) -> dict[str, list[Point]]:
    return {name: train(objectives, schedule, START, LR, DECAY, THRESHOLD) for name, schedule in schedules().items()}


# Theorem 3.3, Table 2: θ in R. Its closed forms are those of θ_ref = -10, not of the -5 the text names (README.md).

LAMBDAS, BUDGETS, SEEDS, STEP_SIZE = (0.1, 0.25, 0.5, 0.75, 0.9), (100, 1_000, 10_000, 50_000), 5, 4.0
THEOREM: Objectives = {"dpo": dpo((-1.0,), (-0.5,), reference=(-10.0,)), "sft": sft((1.0,), (0.5,))}


def mix(objectives: Objectives, lam: float, theta: float) -> float:
    """f_Mix,λ in one dimension."""
    return lam * objectives["dpo"].value((theta,)) + (1.0 - lam) * objectives["sft"].value((theta,))


def best(objectives: Objectives, lam: float) -> float:
    """argmin f_Mix,λ in one dimension, by bisection of the derivative: f is convex, 0 < λ < 1."""
    low, high = -100.0, 100.0
    while (middle := (low + high) / 2) not in (low, high):
        slope = lam * objectives["dpo"].gradient((middle,))[0] + (1.0 - lam) * objectives["sft"].gradient((middle,))[0]
        low, high = (low, middle) if slope > 0 else (middle, high)
    return middle


def final_gap(schedule: Schedule, lam: float, start: float = 0.0, step_size: float = STEP_SIZE) -> float:
    """G_Mix,λ (eq. 6) of the last iterate, with the learning rate α0/√T of Theorem 4.1."""
    theta = train(THEOREM, schedule, (start,), step_size / math.sqrt(schedule.steps))[-1][0]
    return mix(THEOREM, lam, theta) - mix(THEOREM, lam, best(THEOREM, lam))


def theorem_gaps(lam: float, steps: int, seeds: int = SEEDS) -> tuple[float, float]:
    """G of sequential with T_DPO = T_SFT = T/2, and the mean G of ALRIGHT over seeds, at one budget T."""
    alright = [final_gap(Alright(lam, steps, seed), lam) for seed in range(seeds)]
    return final_gap(Sequential(0.5, steps), lam), statistics.fmean(alright)


def main() -> None:
    import toy_figures

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("."), metavar="DIR", help="where the figures go")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)

    print("Figure 2: (f_DPO, f_SFT) at the end, and the distance from the ideal point (0, 0)\n")
    print(f"{'reading':20}" + "".join(f"{name:>20}" for name in ("Sequential", "ALRIGHT", "MAXRIGHT")))
    for reading, objectives in readings().items():
        paths = trajectories(objectives)
        ends = [losses(objectives, paths[name][-1]) for name in ("Sequential", "ALRIGHT", "MAXRIGHT")]
        print(f"{reading:20}" + "".join(f"  ({x:.2f}, {y:.2f}) {math.hypot(x, y):5.2f}" for x, y in ends))
        if reading == FIGURE:
            toy_figures.figure2(objectives, paths, folder / "figure2.png")

    print(f"\nTheorem 3.3: G_Mix,λ at budget T, sequential / ALRIGHT (mean of {SEEDS} seeds)\n")
    print("     λ" + "".join(f"{f'T = {steps:,}':>18}" for steps in BUDGETS))
    table = {lam: [theorem_gaps(lam, steps) for steps in BUDGETS] for lam in LAMBDAS}
    for lam, row in table.items():
        print(f"{lam:6}" + "".join(f"{first:9.4f} / {second:6.4f}" for first, second in row))
    toy_figures.theorem33(THEOREM, table, BUDGETS, folder / "theorem33.png")
    print(f"\nwrote {folder / 'figure2.png'} and {folder / 'theorem33.png'}")


if __name__ == "__main__":
    main()
