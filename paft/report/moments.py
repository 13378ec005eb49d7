"""The measures of one delta, or of several taken together, from one pass over its entries.

For a LoRA module with factors A [r, n], B [m, r] and scale s the delta δ = B·A has N = m·n entries; a merge adds s·δ. Of a
fine-tuned model or a delta file δ is the difference itself and s = 1.

    share        |{ |δ| < t }| / N, t = 1e-5      PAFT (arXiv 2406.17923, Figure 2); depends on the learning rate
    share scaled |{ |s·δ| < t }| / N               the same of what a merge adds
    Gaussian share  erf(t / (rms·√2))              what a dense Gaussian delta of the same rms would show
    Hoyer        (√N - L1/L2) / (√N - 1)           0 = all equal, 1 = one entry
    N_eff/N      (Σ|δ|)² / (N·Σδ²)                 effective share of entries in use
    Gini         Σ_ij ||δ_i|-|δ_j|| / (2NΣ|δ|)     0 = all equal, 1 = one entry
    d90, d99     smallest share of entries that holds 90 % and 99 % of Σδ²

rms, max, L1 and the Frobenius norm are those of s·δ. The last four do not change when δ is rescaled (for large N, Hoyer is
1 - √(N_eff/N)); `reference` has what Gaussian and Laplace entries show. A product of Gaussian factors is less even than a
Gaussian: N_eff/N is (2/π)² = 0.405 at rank 1 and nears 2/π as r grows.

The delta is never built. A product is computed in float64, block by block, so counts and sums do not depend on the blocks and
nothing overflows or underflows; what is read from files comes in float32. Counts are exact, sums are exact but for float64
rounding; Gini, d90, d99 and shares at other thresholds have the bounds of `histogram`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from paft.report.histogram import Bounded, Histogram
from paft.report.onbase import OnBase, beside_base
from paft.report.reference import gaussian_share
from paft.report.scan import scan
from paft.report.sources import Part


@dataclass(frozen=True)
class Moments:
    """Sums over entries from which every measure follows; ``a + b`` pools two sets of entries.

    Counts ``below`` (|δ| < t), ``below_scaled`` (|s·δ| < t), ``zeros`` (δ = 0 exactly); ``expected`` and
    ``expected_scaled`` are the counts below t of Gaussian tensors with the same rms each; ``max`` and ``histogram`` are of
    s·δ; rows and columns are those of all tensors, and how many of them are zero everywhere.
    """

    below: int
    below_scaled: int
    zeros: int
    expected: float
    expected_scaled: float
    max: float
    rows: int
    columns: int
    zero_rows: int
    zero_columns: int
    histogram: Histogram
    on_base: OnBase | None = None

    def __add__(self, other: Moments) -> Moments:
        both = self.on_base is not None and other.on_base is not None
        pooled: dict[str, Any] = {key: value + getattr(other, key) for key, value in vars(self).items()
                                  if key != "on_base" or both}
        pooled["max"] = max(self.max, other.max)
        return Moments(**pooled)

    @property
    def entries(self) -> int:
        return self.histogram.entries

    @property
    def l1(self) -> float:
        return self.histogram.l1

    @property
    def share(self) -> float:
        return self.below / self.entries

    @property
    def share_scaled(self) -> float:
        return self.below_scaled / self.entries

    @property
    def rms(self) -> float:
        return math.sqrt(self.histogram.sumsq / self.entries)

    @property
    def frobenius(self) -> float:
        return math.sqrt(self.histogram.sumsq)

    @property
    def hoyer(self) -> float | None:
        """None where it is not defined: a zero delta, or a single entry."""
        if not self.histogram.sumsq or self.entries == 1:
            return None
        root = math.sqrt(self.entries)
        return (root - self.l1 / self.frobenius) / (root - 1)

    @property
    def n_eff(self) -> float | None:
        """N_eff/N; None for a zero delta."""
        return (self.l1 / self.frobenius) ** 2 / self.entries if self.histogram.sumsq else None

    @property
    def gini(self) -> Bounded | None:
        return self.histogram.gini

    @property
    def d90(self) -> Bounded | None:
        return self.histogram.holding(0.9)

    @property
    def d99(self) -> Bounded | None:
        return self.histogram.holding(0.99)

    @property
    def relative(self) -> float | None:
        """‖s·δ‖_F / ‖W‖_F; None without a base, or where W is zero."""
        base = self.on_base
        return self.frobenius / math.sqrt(base.weight_sumsq) if base and base.weight_sumsq else None

    @property
    def invisible(self) -> float | None:
        """Share of the entries that W + s·δ, rounded to W's type, leaves at W; None without a base."""
        return self.on_base.invisible / self.entries if self.on_base else None

    @property
    def landed(self) -> float | None:
        """Share of Σ(s·δ)² in the entries that the rounding leaves changed; None without a base or of a zero delta."""
        base = self.on_base
        return base.landed / base.energy if base and base.energy else None

    def scale_free(self) -> dict[str, float | None]:
        """The measures that rescaling leaves alone, by name, without their bounds."""
        bounded = {"gini": self.gini, "d90": self.d90, "d99": self.d99}
        return {"hoyer": self.hoyer, "n_eff": self.n_eff} | {key: each and each.value for key, each in bounded.items()}

    def to_dict(self) -> dict[str, Any]:
        bounded = {"gini": self.gini, "d90": self.d90, "d99": self.d99}
        return {
            "entries": self.entries,
            "share_unscaled": self.share,
            "share_scaled": self.share_scaled,
            "gaussian_share_unscaled": self.expected / self.entries,
            "gaussian_share_scaled": self.expected_scaled / self.entries,
            "zeros": self.zeros,
            "rows": self.rows,
            "columns": self.columns,
            "zero_rows": self.zero_rows,
            "zero_columns": self.zero_columns,
            "rms": self.rms,
            "max": self.max,
            "frobenius": self.frobenius,
            "l1": self.l1,
            "relative_norm": self.relative,
            "invisible": self.invisible,
            "energy_visible": self.landed,
            **self.scale_free(),
            "bounds": {key: each and each.bound for key, each in bounded.items()},
        }


def measure(part: Part, threshold: float, tile_rows: int | None = None) -> Moments:
    """Moments of one part in one pass over its blocks, and one over its row tiles where its base is there."""
    scale = abs(part.scale)
    found = scan(part.rows, part.columns, part.blocks(tile_rows), scale, threshold)
    histogram = found.histogram
    rms = math.sqrt(histogram.sumsq / part.entries)
    return Moments(
        below=found.below,
        below_scaled=found.below_scaled,
        zeros=found.zeros,
        expected=part.entries * gaussian_share(rms, threshold * scale),
        expected_scaled=part.entries * gaussian_share(rms, threshold),
        max=found.max,
        rows=part.rows,
        columns=part.columns,
        zero_rows=int((~found.row_used).sum()),
        zero_columns=int((~found.column_used).sum()),
        histogram=histogram,
        on_base=beside_base(part),
    )
