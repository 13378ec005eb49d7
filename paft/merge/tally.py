"""What a merge did, counted tile by tile: entries kept per adapter, sign conflicts, and what survived the rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Tally:
    """Counts over one tensor, or over many (`add`). Energies are sums of squares: float64 along a row, exact over the rows
    of a tensor and over tensors, so neither tiles nor threads change them.
    """

    adapters: Sequence[str]
    entries: int = 0
    conflicts: int = 0
    nonzero: int = 0
    survived: int = 0
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    squares: list[list[float]] = field(default_factory=lambda: [[], [], []])

    def __post_init__(self) -> None:
        self.before, self.after = [0] * len(self.adapters), [0] * len(self.adapters)

    def filtered(self, tiles: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
        """Count a tile of every delta before and after its filter, and the entries whose kept signs differ."""
        self.entries += tiles[0].numel()
        for index, (tile, part) in enumerate(zip(tiles, parts, strict=True)):
            self.before[index] += int((tile != 0).count_nonzero())
            self.after[index] += int((part != 0).count_nonzero())
        if len(parts) > 1:
            up, down = (parts[0] > 0), (parts[0] < 0)
            for part in parts[1:]:
                up |= part > 0
                down |= part < 0
            self.conflicts += int((up & down).count_nonzero())

    def rounded(self, delta: torch.Tensor, applied: torch.Tensor) -> None:
        """Count a tile of the merged delta D, and of ``applied`` = rounded(W + D) - W."""
        landed, changed = applied != 0, delta != 0
        self.nonzero += int(changed.count_nonzero())
        self.survived += int((landed & changed).count_nonzero())
        square, error = delta.square(), (applied - delta).square_()
        for total, values in zip(self.squares, (square, square * landed, error), strict=True):
            total += values.sum(dim=1, dtype=torch.float64).tolist()

    def counted(self, entries: int, counts: Sequence[int], sums: Sequence[Sequence[float]]) -> None:
        """What `filtered` and `rounded` count of one tile, from a kernel (`kernels.counters`, and the three energies by row)."""
        n = len(self.adapters)
        self.entries += entries
        self.before = [a + b for a, b in zip(self.before, counts[:n], strict=True)]
        self.after = [a + b for a, b in zip(self.after, counts[n : 2 * n], strict=True)]
        self.conflicts += counts[2 * n]
        self.nonzero += counts[2 * n + 1]
        self.survived += counts[2 * n + 2]
        for total, values in zip(self.squares, sums, strict=True):
            total += values

    def close(self) -> None:
        """All rows of the tensor are counted: their energies become one number each, exact, so that a record of it is short."""
        self.squares = [[math.fsum(part)] for part in self.squares]

    def add(self, other: Tally) -> None:
        """Take in the finished tally of one tensor."""
        self.entries += other.entries
        self.conflicts += other.conflicts
        self.nonzero += other.nonzero
        self.survived += other.survived
        self.before = [a + b for a, b in zip(self.before, other.before, strict=True)]
        self.after = [a + b for a, b in zip(self.after, other.after, strict=True)]
        for total, part in zip(self.squares, other.squares, strict=True):
            total.append(math.fsum(part))

    def report(self) -> dict[str, Any]:
        """The ``adapters``, ``sign_conflicts`` and ``rounding`` parts of a merge's report; shares are in [0, 1]."""
        energy, landed, error = (math.fsum(part) for part in self.squares)
        adapters = [
            {"name": name, "nonzero": before, "kept": after, "kept_share": _share(after, before)}
            for name, before, after in zip(self.adapters, self.before, self.after, strict=True)
        ]
        rounding = {
            "entries_changed": self.nonzero,
            "entries_surviving": _share(self.survived, self.nonzero),
            "energy_surviving": _share(landed, energy),
            "relative_error": math.sqrt(_share(error, energy)) if energy else 0.0,
        }
        return {
            "adapters": adapters,
            "sign_conflicts": self.conflicts / self.entries if self.entries else 0.0,
            "merged_norm": math.sqrt(energy),
            "rounding": rounding,
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
