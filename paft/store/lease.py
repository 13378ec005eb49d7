"""One driver a URL, as far as that can be had without locks: a note behind the URL that its driver renews.

    URL/.paft-driver.json      {"who": "host, process 17", "id": ..., "beat": 4}

A note that changes while one looks is a driver at work; one that does not is left over from a driver that died. A driver that
finds another's note, or none, was taken for dead: it ends, and what is behind the URL is no longer its to change.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError
from paft.progress import say
from paft.store.bucket import Bucket

NOTE = ".paft-driver.json"
BEAT = 10.0  # seconds between two renewals
PATIENCE = 3 * BEAT  # that a note stays unchanged until its driver counts as dead
SETTLE = 0.3  # in which two that begin at once see each other
_HELD: dict[str, _Lease] = {}  # by URL


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
    _HELD[bucket.url] = lease
    thread = threading.Thread(target=lease.renew, args=[threading.current_thread() is threading.main_thread()], daemon=True)
    thread.start()
    try:
        yield
        with suppress(ResourceError, NotFoundError):  # what was to be written is there
            check_sole(bucket)
    except BaseException:
        if lease.lost is not None:
            lease.refuse(lease.lost)
        raise
    finally:
        lease.stop.set()
        thread.join()
        del _HELD[bucket.url]
        with suppress(PaftError, OSError):
            if lease.lost is None and lease.is_ours(lease.read()):
                bucket.remove(NOTE)
                bucket.tidy()


def is_lost(bucket: Bucket) -> bool:
    """Has this process had the note, and found that another has taken over?"""
    return bucket.url in _HELD and _HELD[bucket.url].lost is not None


def check_sole(bucket: Bucket) -> None:
    """MismatchError where the note is no longer this process's; asked before something is put in its place."""
    if lease := _HELD.get(bucket.url):
        lease.look()
        if lease.lost is not None:
            lease.refuse(lease.lost)


@dataclass
class _Lease:
    bucket: Bucket
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0
    lost: dict[str, Any] | None = None  # whose the note has become; {} where it has gone
    stop: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.RLock)  # one looks at the note, or renews it

    def read(self) -> dict[str, Any] | None:
        """The note that is there; {} for one that is no note."""
        for _ in range(3):  # on a disk one can be read while it is written
            try:
                found = json.loads(self.bucket.read(NOTE))
            except NotFoundError:
                return None
            except ValueError:
                time.sleep(0.05)
                continue
            return found if isinstance(found, dict) else {}
        return {}

    def write(self) -> None:
        self.beat += 1
        note = {"who": f"{socket.gethostname()}, process {os.getpid()}", "id": self.id, "beat": self.beat}
        self.bucket.write(NOTE, json.dumps(note).encode())

    def is_ours(self, note: dict[str, Any] | None) -> bool:
        return note is not None and note.get("id") == self.id

    def take(self, quiet: bool) -> None:
        if (found := self.read()) is not None:
            say(f"{self.bucket.url} has a driver, or had one that died: looking for {PATIENCE:.0f} s", quiet=quiet)
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                time.sleep(min(1.0, PATIENCE / 5))
                if (now := self.read()) is None:
                    break
                if now != found:
                    self.refuse(now)
        self.write()
        time.sleep(SETTLE)
        if not self.is_ours(now := self.read()):
            self.refuse(now or {})

    def refuse(self, note: dict[str, Any]) -> None:
        raise MismatchError(f"another process writes {self.bucket.url}: {note.get('who', 'it has ended since')}",
                            hint="wait for it, or choose another -o URL")

    def look(self) -> None:
        """Whether the note is ours still; from when it is not, for good."""
        with self.lock:
            if self.lost is None and not self.is_ours(now := self.read()):
                self.lost = now or {}

    def renew(self, in_main: bool) -> None:
        """In a thread: go on until told, or until another has taken over; then end this process's work."""
        while not self.stop.wait(BEAT):
            with suppress(PaftError, OSError), self.lock:  # a service may rest for a while
                self.look()
                if self.lost is None:
                    self.write()
            if self.lost is not None:
                if in_main and (main := threading.main_thread().ident):
                    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as of a shell's `&`
                    signal.pthread_kill(main, signal.SIGTERM if ignored else signal.SIGINT)
                return
