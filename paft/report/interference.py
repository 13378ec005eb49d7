"""How two deltas meet: what adding them cancels, what TIES would trim and vote away, and where.

    cosine          ⟨a, b⟩ / ‖a‖‖b‖;  of two deltas in random position 0 ± 1/√N for a tensor of N entries,
                    more where they read the same inputs or write the same outputs (`angles.turned`)
    sign conflict   entries with ab < 0 / entries with both ≠ 0;  chance 1/2
    in conflict     mean of Σ a² over conflicts / Σ a² and the same of b, so that the larger does not drown the smaller;
                    chance: half of what lies where both are ≠ 0
    overlap         |top_k(a) ∩ top_k(b)| / k;  chance k / N
    trimmed         1 - Σ_kept a² / Σ a², and the same of b: what TIES's trim drops at this density
    voted away      energy of the kept entries that lose the vote / Σ a² (b²)

The same factors turned at random are the null model: it says what two unrelated updates of this rank would show. mergekit
and PEFT have no such report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

from paft.errors import MismatchError, UsageError
from paft.report.angles import Angles, angles, products, turned
from paft.report.overlap import Overlap, overlap
from paft.report.passes import Progress, each
from paft.report.sources import Part, Source

SCHEMA = 1
DENSITY = 0.2


@dataclass(frozen=True)
class Meeting:
    """A tensor that both change: ``d90`` of each is the share of its entries that holds 90 % of its energy."""

    name: str
    layer: int | None
    kind: str
    overlap: Overlap
    d90: tuple[float, float]
    spaces: tuple[Angles, Angles] | None


@dataclass(frozen=True)
class Clash:
    """Tensors taken together: a layer, a module kind, one tensor or all; see the module for the measures."""

    label: str
    tensors: int
    sums: Overlap
    d90: tuple[float, float]
    rows: Angles | None
    columns: Angles | None

    @property
    def cosine(self) -> float:
        return _ratio(self.sums.dot, math.sqrt(self.sums.energy_a) * math.sqrt(self.sums.energy_b))

    @property
    def cosine_chance(self) -> float:
        return _ratio(math.sqrt(self.sums.chance), math.sqrt(self.sums.energy_a) * math.sqrt(self.sums.energy_b))

    @property
    def in_conflict(self) -> float:
        return (_ratio(self.sums.conflict_a, self.sums.energy_a) + _ratio(self.sums.conflict_b, self.sums.energy_b)) / 2

    @property
    def in_conflict_chance(self) -> float:
        return (_ratio(self.sums.both_a, self.sums.energy_a) + _ratio(self.sums.both_b, self.sums.energy_b)) / 4

    @property
    def trimmed(self) -> tuple[float, float]:
        """The share of each energy that the trim drops."""
        s = self.sums
        return 1 - _ratio(s.kept_energy_a, s.energy_a, 1.0), 1 - _ratio(s.kept_energy_b, s.energy_b, 1.0)

    @property
    def voted_away(self) -> tuple[float, float]:
        return _ratio(self.sums.lost_a, self.sums.energy_a), _ratio(self.sums.lost_b, self.sums.energy_b)

    def to_dict(self) -> dict[str, Any]:
        s = self.sums
        fewer = min(s.kept_a, s.kept_b)
        return {
            "label": self.label, "tensors": self.tensors, "entries": s.entries,
            "cosine": self.cosine, "cosine_chance": self.cosine_chance,
            "frobenius": [math.sqrt(s.energy_a), math.sqrt(s.energy_b)],
            "sign_conflict": _ratio(s.conflicts, s.both), "both_nonzero": s.both / s.entries,
            "energy_in_conflict": self.in_conflict, "energy_in_conflict_chance": self.in_conflict_chance,
            "overlap": _ratio(s.kept_both, fewer), "overlap_chance": _ratio(s.expected_both, fewer),
            "sign_conflict_in_overlap": _ratio(s.kept_conflicts, s.kept_both),
            "trimmed": list(self.trimmed), "voted_away": list(self.voted_away), "d90": list(self.d90),
            "row_spaces": self.rows and self.rows.to_dict(), "column_spaces": self.columns and self.columns.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Interference:
    """Two deltas, ``names``; ``alone`` are tensors that only one of them changes, which cannot collide."""

    names: tuple[str, str]
    density: float
    tensors: tuple[Clash, ...]
    layers: tuple[Clash, ...]
    kinds: tuple[Clash, ...]
    overall: Clash
    alone: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def worst(self) -> list[Clash]:
        """The layers by energy in conflict against chance, most first."""
        return sorted(self.layers, key=lambda clash: clash.in_conflict_chance - clash.in_conflict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; paft/report/SCHEMA.md says what the keys mean, `advice` adds what to try."""
        return {
            "schema": SCHEMA, "kind": "interference", "names": list(self.names), "density": self.density,
            "overall": self.overall.to_dict(),
            "layers": [clash.to_dict() for clash in self.layers], "kinds": [clash.to_dict() for clash in self.kinds],
            "tensors": [clash.to_dict() for clash in self.tensors], "alone": [list(names) for names in self.alone],
            "worst_layers": [clash.label for clash in self.worst[:3] if not math.isnan(clash.in_conflict)],
        }  # fmt: skip


def interference(a: Source, b: Source, *, density: float = DENSITY, fast: bool = False, threads: int | None = None,
                 progress: Progress | None = None) -> Interference:
    """Measure two deltas on one another; ``density`` in (0, 1] is TIES's share of entries that are kept.

    ``fast`` looks at the factors alone: cosines, norms and angles; all else is NaN. Raises UsageError for another density, or
    for ``fast`` where one is no product, MismatchError where the two have no tensor in common or one of another shape.
    """
    if not 0 < density <= 1:
        raise UsageError(f"density must be in (0, 1], not {density}", hint="TIES's paper keeps --density 0.2")
    others = {part.name: part for part in b.parts}
    pairs = [_Pair(part, others[part.name]) for part in a.parts if part.name in others]
    if not pairs:
        raise MismatchError(f"{a.name} and {b.name} change no tensor in common ({a.parts[0].name}, {b.parts[0].name}, ...)",
                            hint="they need one base; for a model beside an adapter pass --base")
    meetings = each(pairs, lambda pair: pair.glance() if fast else pair.meet(density), threads, progress)
    in_order = sorted(meetings, key=lambda meeting: (meeting.layer is None, meeting.layer or 0))
    shared = {pair.name for pair in pairs}
    alone = tuple(tuple(part.name for part in source.parts if part.name not in shared) for source in (a, b))
    return Interference(
        (a.name, b.name), density, tuple(_clash(meeting.name, [meeting]) for meeting in meetings),
        _clashes(in_order, lambda meeting: "other" if meeting.layer is None else str(meeting.layer)),
        _clashes(meetings, lambda meeting: meeting.kind), _clash("all", meetings), (alone[0], alone[1]),
    )  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    a: Part
    b: Part

    def __post_init__(self) -> None:
        if (self.a.rows, self.a.columns) != (self.b.rows, self.b.columns):
            raise MismatchError(f"the two disagree on the shape of {self.a.name}", hint="they were trained on different bases")

    @property
    def name(self) -> str:
        return self.a.name

    @property
    def entries(self) -> int:
        return self.a.entries

    def meet(self, density: float) -> Meeting:
        found, sizes = overlap(self.a.tiled(), self.b.tiled(), density)
        d90 = [held.value if (held := each.holding(0.9)) else 0.0 for each in sizes]
        chance = turned(self.a, self.b)
        found = found if chance is None else replace(found, chance=chance)
        return Meeting(self.name, self.a.layer, self.a.kind, found, (d90[0], d90[1]), angles(self.a, self.b))

    def glance(self) -> Meeting:
        """From the factors alone."""
        dot, energy_a, energy_b = products(self.a, self.b)
        told: dict[str, Any] = dict.fromkeys((each.name for each in fields(Overlap)), math.nan)
        told |= {"entries": self.entries, "chance": turned(self.a, self.b), "dot": dot}
        told |= {"energy_a": energy_a, "energy_b": energy_b}
        found = Overlap(**told)
        return Meeting(self.name, self.a.layer, self.a.kind, found, (math.nan, math.nan), angles(self.a, self.b))


def _clashes(meetings: Iterable[Meeting], key: Callable[[Meeting], str]) -> tuple[Clash, ...]:
    members: dict[str, list[Meeting]] = {}
    for meeting in meetings:
        members.setdefault(key(meeting), []).append(meeting)
    return tuple(_clash(label, found) for label, found in members.items())


def _clash(label: str, meetings: Sequence[Meeting]) -> Clash:
    """d90 is a mean weighted by entries, angles are means over the tensors that have them (of the largest, the largest)."""
    sums = reduce(Overlap.__add__, (meeting.overlap for meeting in meetings))
    d90 = [sum(meeting.d90[side] * meeting.overlap.entries for meeting in meetings) / sums.entries for side in (0, 1)]
    spaces = [meeting.spaces for meeting in meetings if meeting.spaces]
    rows, columns = (_mean([pair[side] for pair in spaces]) for side in (0, 1))
    return Clash(label, len(meetings), sums, (d90[0], d90[1]), rows, columns)


def _mean(found: Sequence[Angles]) -> Angles | None:
    if not found:
        return None
    return Angles(max(one.largest for one in found), sum(one.mean_square for one in found) / len(found),
                  sum(one.chance for one in found) / len(found))


def _ratio(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
