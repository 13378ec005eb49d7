"""An interference report as rows and columns: one pair as measures beside chance, or by layer, module kind or tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paft.report.angles import Angles
from paft.report.interference import Clash, Interference
from paft.report.render import Column
from paft.report.verdict import percent

Rows = list[dict[str, Any]]


def summary(found: Interference) -> tuple[Rows, list[Column]]:
    """One row a measure, with what two unrelated deltas of these ranks would show."""
    overall, (a, b) = found.overall, found.names
    data, sizes = overall.to_dict(), (math.sqrt(overall.sums.energy_a), math.sqrt(overall.sums.energy_b))
    spread = overall.cosine_chance
    digits = max(4, 1 - math.floor(math.log10(spread))) if spread else 4  # 1e-5 in a model of 8B
    lines: list[tuple[str, str, str | None]] = [
        ("cosine", f"{round(overall.cosine, digits) + 0.0:.{digits}f}", f"0 ± {spread:.{digits}f}"),
        ("sign conflict, where both are not 0", percent(data["sign_conflict"]), "50.0%"),
        ("energy in conflict", percent(overall.in_conflict), percent(overall.in_conflict_chance)),
        (f"overlap of the largest {found.density:g}", percent(data["overlap"]), percent(data["overlap_chance"])),
        ("  sign conflict in it", percent(data["sign_conflict_in_overlap"]), "50.0%"),
        *_spaces("row spaces", overall.rows), *_spaces("column spaces", overall.columns),
        *[line for side, name in enumerate(found.names) for line in (
            (f"norm of {name}", f"{sizes[side]:.3g}", None),
            ("  TIES trims, of its energy", percent(overall.trimmed[side]), None),
            ("  and votes away", percent(overall.voted_away[side]), None),
            ("  90 % of it lie in (d90)", percent(overall.d90[side]), None))],
        ("tensors of both, of one alone", f"{overall.tensors}, {len(found.alone[0])} + {len(found.alone[1])}", None),
    ]  # fmt: skip
    rows = [{"measure": label, "value": value, "chance": chance} for label, value, chance in lines if value != percent(math.nan)]
    return rows, [Column("measure", "measure"), Column("value", f"{a} and {b}"), Column("chance", "chance")]


def breakdown(found: Interference, by: str = "layer") -> tuple[Rows, list[Column]]:
    """One row a layer, module kind or tensor, and a last row for all."""
    parts: Sequence[Clash] = {"layer": found.layers, "module": found.kinds, "tensor": found.tensors}[by]
    rows = [_row(part) for part in (*parts, found.overall)]
    a, b = found.names
    columns = [
        Column("label", by),
        Column("cosine", "cosine", ".3f", "⟨a, b⟩ / ‖a‖‖b‖"),
        Column("cosine_chance", "±", ".3f", "its spread by chance"),
        Column("energy_in_conflict", "in conflict", ".1%", "energy in entries of opposite sign (chance: half)"),
        Column("overlap", "overlap", ".1%", f"of the largest {found.density:g} of each (chance {found.density:g})"),
        Column("trim_a", "trim a", ".1%", f"energy of {a} that TIES trims"),
        Column("trim_b", "trim b", ".1%", f"energy of {b} that TIES trims"),
        Column("vote_a", "vote a", ".1%", f"energy of {a} that TIES votes away"),
        Column("vote_b", "vote b", ".1%", f"energy of {b} that TIES votes away"),
        Column("rows", "rows cos²", ".3f", "mean cos² of the principal angles between the row spaces (inputs)"),
        Column("columns", "cols cos²", ".3f", "the same of the column spaces (outputs)"),
    ]
    known = {key for row in rows for key, value in row.items() if value is not None and value == value}  # NaN is not known
    return rows, [column for column in columns if column.key in known]


def worst(found: Interference) -> str:
    """A sentence on the layers that collide most, or that none stands out."""
    # Three deviations of a share of N equally likely signs are 1.5/√N; that energies differ doubles it.
    layers = [clash for clash in found.worst
              if clash.in_conflict > clash.in_conflict_chance + max(0.01, 3 / math.sqrt(clash.sums.entries))]
    if not layers:
        return "No layer has more energy in conflict than chance gives."
    named = [f"{clash.label} ({percent(clash.in_conflict)}, chance {percent(clash.in_conflict_chance)})" for clash in layers[:3]]
    return f"Layers that collide most, by energy in conflict: {', '.join(named)}."


def _spaces(label: str, found: Angles | None) -> list[tuple[str, str, str | None]]:
    if found is None:
        return []
    return [(f"{label}: mean cos² of angles", f"{found.mean_square:.4f}", f"{found.chance:.4f}"),
            ("  largest cosine", f"{found.largest:.3f}", None)]


def _row(part: Clash) -> dict[str, Any]:
    (trim_a, trim_b), (vote_a, vote_b) = part.trimmed, part.voted_away
    return part.to_dict() | {"trim_a": trim_a, "trim_b": trim_b, "vote_a": vote_a, "vote_b": vote_b,
                             "rows": part.rows and part.rows.mean_square, "columns": part.columns and part.columns.mean_square}
