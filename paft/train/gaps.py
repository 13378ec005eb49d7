"""How far each objective is from its optimum, as last seen: what MAXRIGHT decides by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Gaps:
    """``now`` = {objective: f - f*}, from the batches seen last; ``optima`` = {objective: f*}.

    ``smoothing`` s makes it a running mean, s·old + (1-s)·new; 0 is the paper's (arXiv 2410.15483, eq. 16 to 19).
    """

    optima: Mapping[str, float]
    smoothing: float = 0.0
    now: dict[str, float] = field(default_factory=dict)

    def see(self, losses: Mapping[str, float]) -> None:
        """Take in the losses of objectives on one optimiser step's batch."""
        for name, loss in losses.items():
            gap = loss - self.optima[name]
            self.now[name] = self.smoothing * self.now.get(name, gap) + (1.0 - self.smoothing) * gap
