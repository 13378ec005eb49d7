"""Which objective a joint trainer takes at each step: pure objects, ``(step) -> {"sft": weight, "dpo": weight}``.

λ weights DPO everywhere: L = λ·f_DPO + (1-λ)·f_SFT (ALRIGHT / MAXRIGHT, arXiv 2410.15483, eq. 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """The weight of each objective at an optimiser step; an objective of weight 0 is not computed."""

    def __call__(self, step: int) -> dict[str, float]: ...


@dataclass(frozen=True)
class Mix:
    """Both objectives in every step, weighted: the paper's baseline Mix."""

    lam: float

    def __call__(self, step: int) -> dict[str, float]:
        return {"dpo": self.lam, "sft": 1.0 - self.lam}


SCHEDULES: dict[str, Callable[[float], Schedule]] = {"mix": Mix}
