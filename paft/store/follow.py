"""Something that grows on this machine, sent behind a URL while it grows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from paft.errors import PaftError

BEAT = 5.0  # seconds between two looks


@contextmanager
def following(send: Callable[[Any], Any]) -> Iterator[None]:
    """Call ``send(what the last call returned, None at first)`` now and then; the service may rest for a while."""
    stop = threading.Event()

    def follow() -> None:
        last = None
        while not stop.wait(BEAT):
            with suppress(PaftError, OSError):
                last = send(last)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
