"""Sources into checked rows of one role: columns mapped, layouts converted, bad rows told, several sets mixed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from paft.data.formats import Layout, Role, layout, rename
from paft.data.messages import unused_keys
from paft.data.rows import Note, Row, check_leakage, hold_out, row_key, silent
from paft.data.sources import Split, read
from paft.errors import PaftError, UsageError
from paft.recipe import DataSource, Sources, Splits


@dataclass(frozen=True)
class Reading:
    """How sources are read: a mapping for those that have none of their own, what a bad row means, the seed of a mixture."""

    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    seed: int = 0
    note: Note = silent


def load_rows(source: Sources, role: Role, split: Split | None = None, how: Reading | None = None) -> list[Row]:
    """The rows of ``source`` in the shape of ``role`` (`paft.data.formats`); see `paft.data.sources` for what a source is.

    Several sources are joined whole, or, where they have weights w, mixed: with n_i rows in source i,

        total = min_i n_i·W/w_i,   W = Σw,   and source i gives round(total·w_i/W) of its rows, drawn without replacement by seed.

    That is the largest mixture of these shares in which no row is repeated; `datasets.interleave_datasets` reaches such shares
    only on average. A source's ``rows`` takes its first rows, before all this.

    Raises NotFoundError for what does not exist, UsageError for wrong columns, bad rows (unless they are dropped), no rows.
    """
    how = how or Reading()
    parts = sources(source)
    sets = [_load(part, role, split, how) for part in parts]
    one_form([(part.source, rows) for part, rows in zip(parts, sets, strict=True)])
    if parts[0].weight is not None:
        sets = mix(parts, sets, how)
    return [row for rows in sets for row in rows]


def sources(source: Sources) -> list[DataSource]:
    """One source or several, in full; UsageError unless all or none have a weight."""
    given = [source] if isinstance(source, str) else source
    parts = [DataSource(source=each) if isinstance(each, str) else each for each in given]
    if not parts:
        raise UsageError("no data are named")
    if len({part.weight is None for part in parts}) > 1:
        raise UsageError("some data sets have a weight and some have none", hint="weights are shares: give one to each, or none")
    return parts


def mix(parts: list[DataSource], sets: list[list[Row]], how: Reading) -> list[list[Row]]:
    """The rows that each source gives to the mixture, in their own order; see `load_rows`."""
    weights = [float(part.weight or 0) for part in parts]
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(rows) / share for rows, share in zip(sets, shares, strict=True))
    draw, used = random.Random(how.seed), []
    for rows, share in zip(sets, shares, strict=True):
        take = max(1, min(len(rows), round(total * share)))
        used.append([rows[i] for i in sorted(draw.sample(range(len(rows)), take))])
    how.note("mixed " + ", ".join(f"{len(some)} of {len(rows)} rows of {part.source}"
                                  for part, some, rows in zip(parts, used, sets, strict=True)))
    return used


def splits(spec: Splits | Sources, role: Role, fraction: float = 0.1, how: Reading | None = None) -> dict[str, list[Row]]:
    """Rows of train, validation and test, with no row in two of them.

    Splits that the recipe names are used as they are (a row that is in two of them is a MismatchError). A missing one is cut out
    of ``train``: ``fraction`` of the distinct prompts, chosen by the hash of the prompt, so the cut depends on the content alone
    and rows that share a prompt, or come from one conversation, stay together.
    """
    spec = spec if isinstance(spec, Splits) else Splits(train=spec)
    if isinstance(spec.train, str) and spec.train.startswith("demo:") and spec.validation is None and spec.test is None:
        names: tuple[Split, ...] = ("train", "validation", "test")
        return {name: load_rows(spec.train, role, name) for name in names}
    found = {"train": load_rows(spec.train, role, how=how)}
    for name, source in (("validation", spec.validation), ("test", spec.test)):
        if source is None:
            found["train"], found[name] = hold_out(found["train"], fraction, name)
        else:
            found[name] = load_rows(source, role, how=how)
    check_leakage(found)
    return found


def convert(rows: Iterable[Row], role: Role, columns: Mapping[str, str]) -> Iterator[tuple[int, list[Row] | PaftError]]:
    """(number, its rows in the shape of ``role`` or what is wrong with it) for each row; the first row's columns must fit."""
    found: dict[frozenset[str], Layout] = {}  # most sets have one set of columns
    for number, raw in enumerate(rows, 1):
        try:
            row = rename(raw, columns)
            names = frozenset(row)
            if names not in found:
                found[names] = layout(row, role, columns)
            shaped = list(found[names](row))
            _check_text(shaped)
            yield number, shaped
        except PaftError as error:
            if not found:
                raise UsageError(f"row {number}: {error.message}", hint=error.hint) from None
            yield number, error


def _check_text(rows: list[Row]) -> None:
    """JSON can write half of a surrogate pair, which is no character: no tokenizer and no file takes it."""
    try:
        for row in rows:
            row_key(row).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"its text holds half of a surrogate pair, {error.object[error.start]!a}") from None


def _load(part: DataSource, role: Role, split: Split | None, how: Reading) -> list[Row]:
    raw: list[Row] = []
    for row in read(part.source, split, streaming=part.rows is not None):
        if part.rows is not None and len(raw) == part.rows:
            break
        raw.append(row)
    if not raw:
        raise UsageError(f"{part.source} holds no rows")
    good: list[Row] = []
    bad: list[tuple[int, PaftError]] = []
    try:
        for number, found in convert(raw, role, part.columns or how.columns):
            if isinstance(found, PaftError):
                bad.append((number, found))
            else:
                good += found
    except UsageError as error:
        raise UsageError(f"{part.source}: {error.message}", hint=error.hint) from None
    if bad:
        _tell_bad(part.source, bad, len(raw), not good, how)
    _tell_extras(part.source, raw, good, how.note)
    return good


def _tell_bad(source: str, bad: list[tuple[int, PaftError]], total: int, none_good: bool, how: Reading) -> None:
    """Refuse, or note that rows are dropped: one line with how many they are and what is wrong with the first."""
    number, first = bad[0]
    if how.on_bad_row == "refuse" or none_good:
        more = f" ({len(bad)} of {total} rows are bad)" if len(bad) > 1 else ""
        raise UsageError(f"{source}: row {number}: {first.message}{more}",
                         hint=first.hint if none_good else "correct them, or leave them out with --drop-bad-rows")
    how.note(f"{source}: {len(bad)} of {total} rows dropped; the first is row {number}: {first.message}")


def _tell_extras(source: str, raw: list[Row], good: list[Row], note: Note) -> None:
    repeated = len(good) - len({row_key(row) for row in good})
    if repeated and not source.startswith("demo:"):  # whose tasks are fewer than its rows, on purpose
        note(f"{source}: {repeated} of {len(good)} rows are repetitions of another")
    if unused := sorted({key for row in raw for key in unused_keys(row)}):
        note(f"{source}: keys of messages that are not used: {', '.join(unused[:8])}")


def form(row: Row) -> str:
    """What a row trains on: ``text``, ``strings`` (prompt and answer) or ``messages``."""
    return "text" if "prompt" not in row else "messages" if isinstance(row["prompt"], list) else "strings"


def one_form(sets: list[tuple[str, list[Row]]]) -> None:
    """TRL looks at the first row to tell how all are to be rendered, so all must have its form."""
    where: dict[str, str] = {}
    for source, rows in sets:
        for row in rows:
            where.setdefault(form(row), source)
    if len(where) > 1:
        (one, first), (other, second) = list(where.items())[:2]
        both = f"{first} holds {one} and {other}" if first == second else f"{first} holds {one}, {second} holds {other}"
        raise UsageError(f"{both}: one training takes one form",
                         hint="map strings to messages: --columns user=...,assistant=... (or `columns` of that source)")
