"""How the settings of a merge run over depth, as a small table: one row per value that varies, one column per run of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paft.merge.depth import split
from paft.merge.settings import Settings

OUTSIDE = "outside"  # the column of embedding, norm and head
_COLUMNS = 6

Row = dict[tuple[str, int | None], Any]  # (module kind, layer) -> value


def profile(settings: Settings, names: Sequence[str], inputs: Sequence[str]) -> dict[str, Any]:
    """``{"columns": ["0-3", ...], "rows": [{"what": "density of dpo", "where": "mlp", "values": [0.2, ...]}]}``.

    ``names`` are the tensors that the merge changes. Rows are the values that differ between tensors; inputs that are
    alike and module kinds with the same values share one. Columns are runs of layers in which nothing differs, or, if
    those are more than six, six single layers evenly apart; the last is for what lies outside the layers.
    """
    inputs = [one if inputs.count(one) == 1 else f"{one} #{i}" for i, one in enumerate(inputs, 1)]
    found: dict[tuple[str, str | None], Row] = {}
    for name in names:
        place = _place(settings, name)
        for what, value in _quantities(settings, name, inputs):
            found.setdefault(what, {})[place] = value
    rows: dict[str, Row] = {}
    for (key, one), row in found.items():
        alike = all(other == row for (same, _), other in found.items() if same == key)
        if len(set(map(repr, row.values()))) > 1:
            rows[key if alike or one is None else f"{key} of {one}"] = row
    columns = _columns([layer for row in rows.values() for _, layer in row], rows.values())
    return {"columns": list(columns), "rows": [line for what, row in rows.items() for line in _lines(what, row, columns)]}


def _place(settings: Settings, name: str) -> tuple[str, int | None]:
    prefix, layer, rest = split(name)
    stack = prefix if layer is not None and len(settings.depth.counts) > 1 else ""
    return stack + rest.removesuffix(".weight"), layer


def _quantities(settings: Settings, name: str, inputs: Sequence[str]) -> Iterable[tuple[tuple[str, str | None], Any]]:
    """((parameter, input or None), value) of one tensor."""
    weights, parameters = settings.at(name)
    yield from ((("weight", one), weight) for one, weight in zip(inputs, weights, strict=True))
    for key, value in parameters.items():
        if key not in settings.signature.each:
            yield (key, None), value
        else:
            values = value if isinstance(value, list) else [value] * len(inputs)
            yield from (((key, one), each) for one, each in zip(inputs, values, strict=True))


def _columns(layers: Iterable[int | None], rows: Iterable[Row]) -> dict[str, int | None]:
    """The label of each column and a layer that stands for it."""
    deep = sorted({layer for layer in layers if layer is not None})
    at = {layer: repr([sorted((k, v) for (k, one), v in row.items() if one == layer) for row in rows]) for layer in deep}
    runs: list[list[int]] = []
    for layer in deep:
        if runs and at[layer] == at[runs[-1][0]] and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    if len(runs) > _COLUMNS:
        runs = [[deep[round(i * (len(deep) - 1) / (_COLUMNS - 1))]] for i in range(_COLUMNS)]
    labels: dict[str, int | None] = {str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}": run[0] for run in runs}
    return labels | ({OUTSIDE: None} if any(layer is None for row in rows for _, layer in row) else {})


def _lines(what: str, row: Row, columns: Mapping[str, int | None]) -> Iterable[dict[str, Any]]:
    """One line per set of module kinds with the same values."""
    groups: dict[str, list[str]] = {}
    values: dict[str, list[Any]] = {}
    inside = {kind for kind, layer in row if layer is not None}
    outside = {kind: value for (kind, layer), value in row.items() if layer is None}
    shared = next(iter(outside.values()), None) if inside and len(set(map(repr, outside.values()))) == 1 else None
    for kind in dict.fromkeys(kind for kind, _ in row if kind in inside or shared is None):
        cells = [shared if layer is None and kind in inside else row.get((kind, layer)) for layer in columns.values()]
        groups.setdefault(repr(cells), []).append(kind)
        values[repr(cells)] = cells
    for key, kinds in groups.items():
        yield {"what": what, "where": _short(kinds, inside), "values": values[key]}


def _short(kinds: Sequence[str], every: set[str]) -> str:
    """Module kinds in few words: nothing for all of them, a parent's name for all of its children."""
    if set(kinds) >= every:
        return ""
    words: list[str] = []
    for kind in kinds:
        parent, _, leaf = kind.rpartition(".")
        siblings = {other for other in every if other.rpartition(".")[0] == parent}
        words.append(parent if parent and siblings and siblings <= set(kinds) else leaf)
    return ", ".join(dict.fromkeys(words))
