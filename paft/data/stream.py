"""Rows for a trainer: a `Dataset` in memory, or an `IterableDataset` over data that are read as they are trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from paft.data.formats import Role
from paft.data.load import Reading, convert, one_form, sources
from paft.data.rows import Row, Stream, row_key
from paft.data.sources import read
from paft.errors import MismatchError, PaftError, UsageError
from paft.recipe import Sources

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HEAD = 1000  # rows that are read and checked before any training
BUFFER = 1000  # rows among which the next one is drawn


def dataset(rows: list[Row]) -> Dataset | IterableDataset:
    """Rows as a `datasets.Dataset` in memory, or the stream that they are the beginning of."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return rows.source if isinstance(rows, Stream) else Dataset.from_list(rows)


def open_stream(source: Sources, role: Role, how: Reading, held: list[Row]) -> Stream:
    """``source`` as a stream in the shape of ``role``, shuffled in a buffer of `BUFFER` rows; its first `HEAD` rows are checked.

    What is wrong in a later row stops the training there (or, with ``on_bad_row: drop``, the row is left out): a bad row, or one
    that is among the evaluation rows ``held``. Several sources are joined one after the other, or, with weights, drawn from at
    random in these shares until one is exhausted; then all begin anew, as long as the trainer asks for rows.
    """
    from datasets import IterableDataset, concatenate_datasets, interleave_datasets

    parts = sources(source)
    keys = frozenset(_digest(row) for row in held)
    given = [{"source": part.source, "role": role, "columns": dict(part.columns or how.columns), "drop": how.on_bad_row == "drop",
              "rows": part.rows, "held": keys} for part in parts]
    heads = [[_decode(record) for record in islice(_records(**each), HEAD // len(parts))] for each in given]
    for part, head in zip(parts, heads, strict=True):
        if not head:
            raise UsageError(f"{part.source} holds no rows that can be used")
    one_form([(part.source, head) for part, head in zip(parts, heads, strict=True)])
    sets = [IterableDataset.from_generator(_records, gen_kwargs=each) for each in given]
    if parts[0].weight is not None:
        weights = [float(part.weight or 0) for part in parts]
        joined = interleave_datasets(sets, probabilities=[weight / sum(weights) for weight in weights], seed=how.seed)
    else:
        joined = concatenate_datasets(sets) if len(sets) > 1 else sets[0]
    first = [row for head in heads for row in head]
    how.note(f"the data are streamed: the first {len(first)} rows are checked now, the others as they are read")
    shuffled = joined.shuffle(seed=how.seed, buffer_size=BUFFER)
    return Stream(first, shuffled.map(_decode, remove_columns=["row", "fault"]))


def _records(source: str, role: Role, columns: dict[str, str], drop: bool, rows: int | None,
             held: frozenset[bytes]) -> Iterator[dict[str, str]]:
    """Rows as JSON, and faults as records too: `datasets` reads ahead in threads, where an error would be lost or told twice."""
    raw = islice(read(source, streaming=True), rows)
    for number, found in convert(raw, role, columns):
        if isinstance(found, PaftError):
            if not drop:
                yield {"row": "", "fault": f"{source}: row {number}: {found.message}"}
            continue
        for row in found:
            leaks = _digest(row) in held
            yield {"row": row_key(row), "fault": f"{source}: row {number} is in the evaluation data" if leaks else ""}


def _decode(record: dict[str, str]) -> Row:
    if record["fault"] and record["row"]:
        raise MismatchError(record["fault"], hint="remove it from one of them")
    if record["fault"]:
        raise UsageError(record["fault"], hint="correct it, or leave such rows out with --drop-bad-rows")
    return json.loads(record["row"])


def _digest(row: Row) -> bytes:
    return hashlib.sha256(row_key(row).encode()).digest()
