"""A study without a shared disk: a journal on the driver's machine, copied behind a URL, and written by whoever has a desk to it.

    URL            the front, when the search ends
    URL.journal    the study beside it: trial by trial what the driver's file holds

The driver's machine is the only one that writes the file, so no lock is needed but its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from paft.errors import MismatchError
from paft.executor.desk import Desk
from paft.store import Store, following

SUFFIX = ".journal"
Record = dict[str, Any]


class Keeper:
    """The file, as a `Desk` serves it."""

    def __init__(self, file: Path) -> None:
        self._file = JournalFileBackend(str(file))

    def read(self, start: int) -> list[Record]:
        return list(self._file.read_logs(start))

    def append(self, records: list[Record]) -> None:
        self._file.append_logs(records)


class Far(BaseJournalBackend):
    """The same journal from another machine."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def read_logs(self, log_number_from: int) -> list[Record]:
        return self._desk("read", log_number_from)

    def append_logs(self, logs: list[Record]) -> None:
        self._desk("append", logs)


@contextmanager
def journal_of(out: Store, *, resume: bool) -> Iterator[Path]:
    """The journal beside ``out`` as a file of this machine, whose growth goes behind the URL.

    What stands there comes here first, unless the file here has gone on from that. MismatchError where something stands there and
    not ``resume``.
    """
    store, name = out.apart()
    name, file = name + SUFFIX, store.here / (name + SUFFIX)
    there = store.bucket.read(name) if store.bucket.has(name) else None
    if there is not None and not resume:
        raise MismatchError(f"{store}/{name} exists", hint="--resume continues it; or choose another -o URL")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        file.unlink(missing_ok=True)
    if there is not None and not (file.is_file() and file.read_bytes().startswith(there)):
        file.write_bytes(there)
    send = partial(_send, store, name, file)
    try:
        with following(send):
            yield file
    finally:
        send(None)


def _send(store: Store, name: str, file: Path, last: int | None) -> int | None:
    """The whole lines of the journal, if there are more than the ``last`` time; returns how many bytes are there."""
    if not file.is_file():
        return None
    held = file.read_bytes()
    held = held[: held.rfind(b"\n") + 1]
    if len(held) != last:
        store.bucket.write(name, held)
    return len(held)
