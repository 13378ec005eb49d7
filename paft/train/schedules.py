"""Which objective a joint trainer takes at each optimiser step: pure objects, ``(step, gaps) -> {objective: weight}``.

    step    optimiser steps done: 0, 1, ...; the papers count t = step + 1
    gaps    {"dpo": f_DPO - f*_DPO, "sft": f_SFT - f*_SFT} as last seen (`paft.train.gaps`); MAXRIGHT alone looks at them
    λ       weights DPO everywhere: L = λ·f_DPO + (1-λ)·f_SFT (ALRIGHT / MAXRIGHT, arXiv 2410.15483, eq. 6)

An objective that is not named, or has weight 0, is not computed in that step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paft.recipe import JointRecipe

Weights = dict[str, float]
OBJECTIVES = ("dpo", "sft")


@dataclass(frozen=True)
class Schedule:
    """``lam`` is λ, ``steps`` the budget T in optimiser steps."""

    lam: float
    steps: int

    compares = False  # does it look at the gaps, so that it needs f*?
    together = 1  # objectives computed in a step

    def __call__(self, step: int, gaps: Mapping[str, float]) -> Weights:
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Are both gaps to be evaluated, without a graph, before this step?"""
        return False

    @property
    def phases(self) -> tuple[int, ...]:
        """Steps of each phase that starts with a fresh optimiser and a learning-rate schedule of its own."""
        return (self.steps,)

    @property
    def starts(self) -> set[int]:
        """The steps at which a phase follows another one."""
        return {start for start in accumulate(self.phases) if 0 < start < self.steps}


@dataclass(frozen=True)
class Mix(Schedule):
    """Both objectives in every step, weighted: the papers' baseline Mix."""

    together = 2

    def __call__(self, step: int, gaps: Mapping[str, float]) -> Weights:
        return {"dpo": self.lam, "sft": 1.0 - self.lam}


@dataclass(frozen=True)
class Sequential(Schedule):
    """Algorithm 1: one objective after the other, T_DPO = λ·T and T_SFT = (1-λ)·T steps, rounded; ``first`` comes first.

    With 0 < λ < 1 both get a step at least, where the budget has two.
    """

    first: str = "dpo"

    @property
    def phases(self) -> tuple[int, ...]:
        dpo = round(self.lam * self.steps)
        if 0.0 < self.lam < 1.0:
            dpo = min(max(dpo, 1), max(self.steps - 1, 1))
        lengths = {"dpo": dpo, "sft": self.steps - dpo}
        return tuple(lengths[name] for name in self._order)

    @property
    def _order(self) -> list[str]:
        return sorted(OBJECTIVES, key=lambda name: name != self.first)

    def __call__(self, step: int, gaps: Mapping[str, float]) -> Weights:
        return {self._order[0] if step < self.phases[0] else self._order[1]: 1.0}


@dataclass(frozen=True)
class Alright(Schedule):
    """Algorithm 2: DPO with probability λ, else SFT. A step's coin follows from (seed, step): every process throws the same."""

    seed: int = 0

    def __call__(self, step: int, gaps: Mapping[str, float]) -> Weights:
        return {"dpo" if random.Random(f"{self.seed}/{step}").random() < self.lam else "sft": 1.0}


@dataclass(frozen=True)
class Maxright(Schedule):
    """Algorithms 3 (``every`` = 1) and 4: the larger of λ·(f_DPO - f*_DPO) and (1-λ)·(f_SFT - f*_SFT); DPO where they are equal.

    λ = 1 and 0 name one objective, also where its f* is an estimate that a batch falls below. Both are
    evaluated at t = 1 and where t mod k = 0, k = ``every``; in between the gap of what was taken is that of its step.
    """

    every: int = 10
    compares = True

    def __call__(self, step: int, gaps: Mapping[str, float]) -> Weights:
        if self.lam in (0.0, 1.0):
            return {"dpo": self.lam, "sft": 1.0 - self.lam}
        return {"dpo" if self.lam * gaps["dpo"] >= (1.0 - self.lam) * gaps["sft"] else "sft": 1.0}

    def due(self, step: int) -> bool:
        return step == 0 or (step + 1) % self.every == 0


SCHEDULES: dict[str, Callable[[JointRecipe, int], Schedule]] = {
    "mix": lambda recipe, steps: Mix(recipe.lam, steps),
    "sequential": lambda recipe, steps: Sequential(recipe.lam, steps, recipe.order.split("-")[0]),
    "alright": lambda recipe, steps: Alright(recipe.lam, steps, recipe.seed),
    "maxright": lambda recipe, steps: Maxright(recipe.lam, steps, recipe.max_eval_steps),
}
