"""One driver a URL, as far as that can be had without locks: a note behind the URL that its driver renews.

    URL/.paft-driver.json      {"who": "host, process 17", "id": ..., "beat": 4}

A note that changes while one looks is a driver at work; one that does not is left over from a driver that died.
"""

from __future__ import annotations

import _thread
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from paft.errors import MismatchError, NotFoundError, PaftError
from paft.progress import say
from paft.store.bucket import Bucket

NOTE = ".paft-driver.json"
BEAT = 10.0  # seconds between two renewals
PATIENCE = 3 * BEAT  # that a note stays unchanged until its driver counts as dead
SETTLE = 0.3  # in which two that begin at once see each other


@dataclass
class _Lease:
    bucket: Bucket
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0
    lost: dict[str, Any] | None = None  # whose the note has become
    stop: threading.Event = field(default_factory=threading.Event)

    def read(self) -> dict[str, Any] | None:
        """The note that is there; {} for one that is no note."""
        try:
            found = json.loads(self.bucket.read(NOTE))
        except NotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def write(self) -> None:
        self.beat += 1
        note = {"who": f"{socket.gethostname()}, process {os.getpid()}", "id": self.id, "beat": self.beat}
        self.bucket.write(NOTE, json.dumps(note).encode())

    def others(self) -> dict[str, Any] | None:
        """The note, if it is another's."""
        found = self.read()
        return None if found is None or found.get("id") == self.id else found

    def take(self, quiet: bool) -> None:
        if (found := self.others()) is not None:
            say(f"{self.bucket.url} has a driver, or had one that died: looking for {PATIENCE:.0f} s", quiet=quiet)
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                time.sleep(min(1.0, PATIENCE / 5))
                if (now := self.others()) is None:
                    break
                if now != found:
                    self.refuse(now)
        self.write()
        time.sleep(SETTLE)
        if (now := self.others()) is not None:
            self.refuse(now)

    def refuse(self, note: dict[str, Any]) -> None:
        raise MismatchError(f"another process writes {self.bucket.url}: {note.get('who', 'nobody knows which')}",
                            hint="wait for it, or choose another -o URL")

    def renew(self) -> None:
        """In a thread: go on until told, or until another has taken over; then end this process's work."""
        while not self.stop.wait(BEAT):
            with suppress(PaftError, OSError):  # a service may rest for a while
                self.lost = self.others()
                if self.lost is not None:
                    _thread.interrupt_main()
                    return
                self.write()


@contextmanager
def sole(bucket: Bucket, *, quiet: bool = False) -> Iterator[None]:
    """Be the only driver of what is at ``bucket``; MismatchError where another is at work, or has taken over.

    A repository of the hub gets no note: there each would be a commit.
    """
    if bucket.url.startswith("hf://") and not bucket.url.startswith("hf://buckets/"):
        yield
        return
    lease = _Lease(bucket)
    lease.take(quiet)
    thread = threading.Thread(target=lease.renew, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lease.lost is not None:
            lease.refuse(lease.lost)
        raise
    finally:
        lease.stop.set()
        thread.join()
        with suppress(PaftError, OSError):
            if lease.lost is None and lease.others() is None:
                bucket.remove(NOTE)
                bucket.tidy()
