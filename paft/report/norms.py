"""What the factors alone tell of an adapter, in seconds for any size: norms and ranks, no share, no histogram.

    ‖s·B·A‖_F² = s² Σ (BᵀB) ⊙ (A·Aᵀ)     rms = ‖s·B·A‖_F / √N     singular values: `spectrum`

A row of B or a column of A that is zero makes a zero row or column of the delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from paft.errors import UsageError
from paft.report.passes import Progress, each
from paft.report.render import Column
from paft.report.sources import Part, Source
from paft.report.spectrum import Spectrum, of_factors

SCHEMA = 1


@dataclass(frozen=True)
class Norms:
    """A tensor, or several taken together (ranks are then means): ``zero_rows`` and ``zero_columns`` are counts."""

    label: str
    tensors: int
    entries: int
    frobenius: float
    spectral: float
    stable: float
    effective: float
    ranks: int
    dead_ranks: int
    zero_rows: int
    zero_columns: int
    random: tuple[float, float]

    @property
    def rms(self) -> float:
        return self.frobenius / math.sqrt(self.entries)

    def to_dict(self) -> dict[str, Any]:
        named = {key: value for key, value in vars(self).items() if key not in ("random", "stable", "effective")}
        return named | {"rms": self.rms, "stable_rank": self.stable, "effective_rank": self.effective,
                        "random_stable_rank": self.random[0], "random_effective_rank": self.random[1]}


@dataclass(frozen=True)
class NormReport:
    """The factor-only numbers of one adapter."""

    name: str
    tensors: tuple[Norms, ...]
    layers: tuple[Norms, ...]
    kinds: tuple[Norms, ...]
    overall: Norms

    def to_dict(self) -> dict[str, Any]:
        parts = {key: [one.to_dict() for one in getattr(self, key)] for key in ("layers", "kinds", "tensors")}
        return {"schema": SCHEMA, "kind": "norms", "name": self.name, "overall": self.overall.to_dict(), **parts}


def norms(source: Source, *, progress: Progress | None = None) -> NormReport:
    """Norms and ranks from the factors. Raises UsageError where a part of the source is no product."""
    for part in source.parts:
        if part.pair is None:
            raise UsageError(f"{part.name} of {source.name} has no factors", hint="leave out --fast")
    tensors = each(source.parts, _norms, progress=progress)
    pairs = list(zip(source.parts, tensors, strict=True))
    in_order = sorted(pairs, key=lambda pair: (pair[0].layer is None, pair[0].layer or 0))
    layers = _grouped(in_order, lambda part: "other" if part.layer is None else str(part.layer))
    return NormReport(source.name, tuple(tensors), layers, _grouped(pairs, lambda part: part.kind), _pool("all", tensors))


def _norms(part: Part) -> Norms:
    pair = part.factors()
    assert pair is not None
    found: Spectrum = of_factors(pair, part.scale)
    empty = int((pair[0] == 0).all(dim=1).sum()), int((pair[1] == 0).all(dim=0).sum())
    return Norms(part.name, 1, part.entries, found.frobenius, found.spectral, found.stable, found.effective, found.rank or 0,
                 found.dead, *empty, found.random)


def _grouped(pairs: Iterable[tuple[Part, Norms]], key: Callable[[Part], str]) -> tuple[Norms, ...]:
    members: dict[str, list[Norms]] = {}
    for part, one in pairs:
        members.setdefault(key(part), []).append(one)
    return tuple(_pool(label, found) for label, found in members.items())


def _pool(label: str, found: Sequence[Norms]) -> Norms:
    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(found)

    def total(key: str) -> int:
        return sum(getattr(one, key) for one in found)

    return Norms(
        label, len(found), total("entries"), math.sqrt(math.fsum(one.frobenius**2 for one in found)),
        max(one.spectral for one in found), mean(one.stable for one in found), mean(one.effective for one in found),
        total("ranks"), total("dead_ranks"), total("zero_rows"), total("zero_columns"),
        (mean(one.random[0] for one in found), mean(one.random[1] for one in found)),
    )  # fmt: skip


COLUMNS = [
    Column("frobenius", "‖s·B·A‖", ".3g", "Frobenius norm"),
    Column("rms", "rms", ".1e", "root mean square entry of s·B·A"),
    Column("spectral", "spectral", ".2e", "largest singular value"),
    Column("stable_rank", "stable rank", ".1f", "(mean over tensors)"),
    Column("effective_rank", "eff. rank", ".1f", "(mean over tensors)"),
    Column("random_effective_rank", "random", ".1f", "effective rank of random factors of these shapes"),
    Column("ranks", "ranks", "", "ranks of all factors"),
    Column("dead_ranks", "dead", "", "ranks that add nothing"),
    Column("empty", "empty", "", "zero rows and zero columns of s·B·A"),
]


def summary(reports: Sequence[NormReport]) -> tuple[list[dict[str, Any]], list[Column]]:
    """One row an adapter."""
    return [_row(report.overall, report.name) for report in reports], [Column("label", "adapter"), *COLUMNS]


def breakdown(report: NormReport, by: str) -> tuple[list[dict[str, Any]], list[Column]]:
    """One row a layer, module kind or tensor, and a last row for all."""
    parts = {"layer": report.layers, "module": report.kinds, "tensor": report.tensors}[by]
    return [_row(part, part.label) for part in (*parts, report.overall)], [Column("label", by), *COLUMNS]


def _row(part: Norms, label: str) -> dict[str, Any]:
    return {**part.to_dict(), "label": label, "empty": part.zero_rows + part.zero_columns}
