"""A study without a shared disk: a journal on the driver's machine, copied behind a URL, and written by whoever has a desk to it.

    URL            the front, when the search ends
    URL.journal    the study beside it: trial by trial what the driver's file holds

The driver's machine is the only one that writes the file, so no lock is needed but its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from paft.errors import MismatchError, PaftError
from paft.executor.desk import Desk
from paft.store import Store, following, is_lost

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
    here = _lines(file)
    if there is not None and not here.startswith(there):
        here = there
    if here:
        file.write_bytes(here)  # without a line that a full disk has cut
    send = partial(_send, out, store, name, file)
    try:
        with following(send):
            yield file
    except BaseException:
        with suppress(PaftError, OSError):  # what stopped it is what is told
            send(None)
        raise
    send(None)


def _lines(file: Path) -> bytes:
    """The whole lines of a journal."""
    held = file.read_bytes() if file.is_file() else b""
    return held[: held.rfind(b"\n") + 1]


def _send(out: Store, store: Store, name: str, file: Path, last: int | None) -> int | None:
    """Put the journal behind the URL, if it has grown since the ``last`` time; returns how many bytes are there."""
    held = _lines(file)
    if held and len(held) != last and not is_lost(out.bucket):
        store.bucket.write(name, held)
    return len(held)
