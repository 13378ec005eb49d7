"""The recipe of `paft merge`: our YAML or mergekit's, flags over it, and errors that point at their lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paft.catalog import is_mergekit
from paft.errors import MismatchError, UsageError
from paft.recipe import MergeRecipe, amend, validate
from paft.yamlfile import Document, read_yaml


def read_recipe(
    file: Path | None, sets: Sequence[str], parameters: Sequence[str], flags: dict[str, Any]
) -> tuple[MergeRecipe, Document, list[str]]:
    """(the recipe, its document for `pointing_at`, notes); ``-p`` and ``--weights`` go before what an adapter's entry says."""
    document, notes = read_yaml(file) if file else Document({}, {}, "command line"), []
    if is_mergekit(document.data):
        from paft.merge.mergekit.reader import read

        document, notes = read(document, engine=flags.get("engine") or "paft")
    _give_way(document, parameters, flags)
    amend(MergeRecipe, document, (*sets, *(f"parameters.{item}" for item in parameters)), flags)
    short = {f"--set parameters.{item}": f"-p {item}" for item in parameters}
    document.lines.update({loc: short[line] for loc, line in document.lines.items() if line in short})  # as it was typed
    return validate(MergeRecipe, document.data, document), document, notes


def _give_way(document: Document, parameters: Sequence[str], flags: dict[str, Any]) -> None:
    """Take out of the file what flags say otherwise, so that it is not given twice."""
    named = {item.partition("=")[0] for item in parameters} | ({"weight"} if flags.get("weights") is not None else set())
    entries = document.data.get("adapters")
    if not isinstance(entries, list):
        return
    if flags.get("adapters") is not None and any(isinstance(one, dict) and len(one) > 1 for one in entries):
        raise UsageError(f"{document.where(('adapters',))}: this file says how to merge its own adapters",
                         hint="name adapters there or on the command line, not in both")
    for entry in entries:
        for key in named & set(entry if isinstance(entry, dict) else ()):
            del entry[key]
    if "weight" in named:
        document.data.pop("weights", None)
        if isinstance(document.data.get("parameters"), dict):
            document.data["parameters"].pop("weight", None)


@contextmanager
def pointing_at(document: Document) -> Iterator[None]:
    """Give an error about a setting the line or flag where the setting stands."""
    from paft.merge.rules import SettingError

    try:
        yield
    except SettingError as error:
        where = document.where(error.loc)
        raise UsageError(error.message if where == "command line" else f"{where}: {error.message}", hint=error.hint) from None


def export(recipe: MergeRecipe, output_kind: str, file: Path, *, overwrite: bool,
           allow_base_mismatch: bool = False) -> list[str]:
    """Write the merge as mergekit's YAML, after all checks that need no pass over the tensors."""
    from paft.delta import TILE_ELEMENTS
    from paft.merge.inputs import open_inputs
    from paft.merge.job import Job
    from paft.merge.mergekit.contracts import signature
    from paft.merge.mergekit.writer import to_yaml
    from paft.merge.settings import Settings, native

    if output_kind != "full":
        raise UsageError(f"mergekit cannot express --output-kind {output_kind}: it writes whole models")
    if recipe.rounding != "nearest":
        raise UsageError(f"mergekit cannot express --rounding {recipe.rounding}", hint="leave it at nearest")
    if file.exists() and not overwrite:
        raise MismatchError(f"{file} exists", hint="name another file, or pass --overwrite")
    known = native(recipe.method, recipe.dialect) if recipe.engine == "paft" else signature(recipe.method)
    settings = Settings.read(known, recipe.adapters, recipe.parameters, recipe.weights)
    inputs = open_inputs(settings.inputs, recipe.base, allow_base_mismatch=allow_base_mismatch, weights=True)
    settings = settings.over(inputs.base.entries)
    if recipe.engine == "paft":
        Job(inputs, recipe.method, settings, recipe.dialect, recipe.seed, None, output_kind, TILE_ELEMENTS, 1).check_parameters()
    for _ in settings.distinct(inputs.touched()):
        pass
    text = to_yaml(settings, inputs, dialect=recipe.dialect, dtype=recipe.dtype, engine=recipe.engine)
    file.write_text(text, encoding="utf-8")
    return [f"{file}: {recipe.method} of {len(settings.inputs)} inputs as mergekit's YAML", f"next: paft merge -c {file} -o DIR"]


def profile_lines(profile: dict[str, Any], width: int = 79, rows: int = 8) -> list[str]:
    """The values that vary over depth, one row each, at most ``rows`` of them."""
    if not profile["rows"]:
        return []
    labels = [row["what"] + (f" ({row['where']})" if row["where"] else "") for row in profile["rows"]]
    cells = [[_cell(value) for value in row["values"]] for row in profile["rows"]]
    widths = [max(len(column), *(len(row[i]) for row in cells)) + 2 for i, column in enumerate(profile["columns"])]
    left = min(max(map(len, [*labels, "by layer"])), width - sum(widths))
    lines = [(f"{label if len(label) <= left else label[: left - 1] + '…':<{left}}"
              + "".join(f"{value:>{size}}" for value, size in zip(row, widths, strict=True))).rstrip()
             for label, row in [("by layer", profile["columns"]), *zip(labels, cells, strict=True)]]
    more = len(lines) - 1 - rows
    return lines if more <= 0 else [*lines[: rows + 1], f"and {more} more rows (--json shows all)"]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
