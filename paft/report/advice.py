"""Which method to try first on two deltas, and why: rules on their geometry, written so that one can disagree with them.

    cosine >= 0.3                         they say the same: add them and the common part counts twice, so average (linear)
    cosine <= -0.1, or the energy in      they contradict each other: let one sign win (ties), at the density that keeps 90 %
    conflict 5 points above chance        of the energy of both
    else                                  nearly orthogonal: a sum keeps both (task arithmetic), a trim only costs

A norm more than three times the other's is told before all: there weights decide more than the method. This is a first
guess from geometry alone; what a delta does is measured by `paft eval` and `paft compare`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paft.report.interference import Interference
from paft.report.verdict import percent

ALIGNED, OPPOSED, EXCESS, UNEQUAL, ALIKE = 0.3, -0.1, 0.05, 3.0, 0.5


@dataclass(frozen=True)
class Advice:
    """``method`` (None: there is nothing to merge) with its ``density``, the reasons, and the command."""

    method: str | None
    density: float | None
    why: str
    warnings: tuple[str, ...]
    command: str | None

    @property
    def lines(self) -> list[str]:
        """For people: the warnings, the reason, the command."""
        if self.method is None:
            return [self.why]
        return [*(f"note: {warning}." for warning in self.warnings), f"try {self.method}: {self.why}.", f"next: {self.command}"]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "warnings": list(self.warnings)}


def advise(found: Interference, paths: Mapping[str, str] | None = None) -> Advice:
    """Apply the rules to one pair; ``paths`` has what the command should call each."""
    overall, (a, b) = found.overall, found.names
    command = f"paft merge {(paths or {}).get(a, a)} {(paths or {}).get(b, b)} --method"
    sizes = math.sqrt(overall.sums.energy_a), math.sqrt(overall.sums.energy_b)
    if not all(sizes):
        empty = a if not sizes[0] else b
        return Advice(None, None, f"{empty} changes nothing where both act: there is nothing to merge.", (), None)
    warnings = tuple(_warnings(found, sizes))
    trimmed, voted = overall.trimmed, overall.voted_away
    cost = (f"at density {found.density:g} TIES would trim {percent(trimmed[0])} and {percent(trimmed[1])} of their energy and "
            f"vote away {percent(voted[0])} and {percent(voted[1])}")
    told = (f"cosine {round(overall.cosine, 2) + 0.0:.2f}, {percent(overall.in_conflict)} of the energy in conflict, "
            f"chance {percent(overall.in_conflict_chance)}")
    excess = overall.in_conflict - overall.in_conflict_chance
    if overall.cosine >= ALIGNED:
        why = f"they point the same way (cosine {overall.cosine:.2f}): a sum counts the common part twice, an average does not"
        return Advice("linear", None, why, warnings, f"{command} linear")
    if overall.cosine <= OPPOSED or excess >= EXCESS:
        density = min(1.0, math.ceil(20 * max(overall.d90)) / 20)
        why = f"they contradict each other ({told}): one sign has to win; density {density:g} keeps 90 % of both"
        return Advice("ties", density, why, warnings, f"{command} ties -p density={density:g}")
    why = f"they are nearly orthogonal ({told}): a sum keeps both, while {cost}"
    return Advice("task_arithmetic", None, why, warnings, f"{command} task_arithmetic")


def _warnings(found: Interference, sizes: tuple[float, float]) -> list[str]:
    large, small = (0, 1) if sizes[0] >= sizes[1] else (1, 0)
    ratio = sizes[large] / sizes[small]
    said = []
    if ratio > UNEQUAL:
        said.append(f"{found.names[large]} is {ratio:.1f} times as large as {found.names[small]}: where both act it wins nearly "
                    "every vote, and weights decide more than the method")
    rows, columns = found.overall.rows, found.overall.columns
    if rows and columns and rows.mean_square > ALIKE > columns.mean_square:
        said.append(f"their row spaces nearly coincide (mean cos² {rows.mean_square:.2f}) and their column spaces do not: LoRAs "
                    "of one seed start from the same A, which says nothing of the tasks")
    for name, alone in zip(found.names, found.alone, strict=True):
        if alone:
            said.append(f"{len(alone)} tensors are changed by {name} alone ({alone[0]}{', ...' * (len(alone) > 1)})")
    return said
