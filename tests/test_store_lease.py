"""One driver a URL: the second is refused, a dead one's note is passed over, one that was overtaken ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paft.errors import MismatchError
from paft.store import NOTE, Bucket, lease, sole

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(f"file://{tmp_path}/run")


def test_a_second_driver_is_refused_and_a_later_one_is_not(bucket: Bucket, tmp_path: Path) -> None:
    with sole(bucket):
        with pytest.raises(MismatchError, match=f"another process writes .*process {os.getpid()}"), sole(bucket):
            raise AssertionError
        assert bucket.has(NOTE)
    assert not (tmp_path / "run").exists()
    with sole(bucket):
        bucket.write("kept", b"")
    assert list(bucket.files()) == ["kept"]


def test_a_dead_driver_s_note_is_passed_over(bucket: Bucket) -> None:
    script = f"import os; from paft.store import *\nwith sole(Bucket({bucket.url!r})): os.kill(os.getpid(), {signal.SIGKILL:d})"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    assert bucket.has(NOTE)
    with sole(bucket):
        assert json.loads(bucket.read(NOTE))["who"].endswith(f"process {os.getpid()}")


def test_nothing_but_a_note_is_a_note(bucket: Bucket) -> None:
    bucket.write(NOTE, b"[1, 2")
    with sole(bucket):
        pass
    assert not bucket.files()


def test_one_who_ends_while_another_looks_makes_way(bucket: Bucket) -> None:
    bucket.write(NOTE, b'{"id": "the first", "who": "it", "beat": 9}')
    remover = threading.Timer(0.3, bucket.remove, [NOTE])
    remover.start()
    with sole(bucket):
        assert json.loads(bucket.read(NOTE))["id"] != "the first"
    remover.join()


def test_one_who_was_overtaken_ends(bucket: Bucket) -> None:
    with pytest.raises(MismatchError, match="the other"), sole(bucket):
        for _ in range(600):
            bucket.write(NOTE, json.dumps({"id": "another", "who": "the other", "beat": 1}).encode())
            time.sleep(0.05)
    assert json.loads(bucket.read(NOTE))["id"] == "another"  # it stays whose it is


def test_one_who_slept_does_not_go_on_over_what_another_has_finished(bucket: Bucket) -> None:
    """The other's note has gone with it."""
    with pytest.raises(MismatchError, match="it has ended since"), sole(bucket):
        bucket.write("finished", b"by the other")
        for _ in range(600):
            bucket.remove(NOTE)
            time.sleep(0.05)
    assert list(bucket.files()) == ["finished"]


OVERTAKEN = """
import sys, time
from concurrent.futures import ThreadPoolExecutor, wait
from paft.store import *
from paft.store import lease
from paft.cli import _interrupt
import signal
signal.signal(signal.SIGTERM, _interrupt)
lease.BEAT = lease.SETTLE = 0.05
bucket = Bucket(sys.argv[1])
with sole(bucket), ThreadPoolExecutor(1) as pool:
    lease._HELD[bucket.url].write = lambda: bucket.write(NOTE, b'{"id": "x", "who": "the other"}')
    print("waits", flush=True)
    wait([pool.submit(time.sleep, 3)])
    time.sleep(60)
print("success")
"""


@pytest.mark.parametrize("start", [[], ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]], ids=["", "without Ctrl-C"])
def test_one_who_was_overtaken_ends_wherever_it_waits(start: list[str], bucket: Bucket) -> None:
    done = subprocess.run([*start, sys.executable, "-c", OVERTAKEN, bucket.url], cwd=ROOT, capture_output=True, text=True,
                          timeout=50)
    assert done.returncode == 1 and done.stdout == "waits\n" and "another process writes" in done.stderr


def test_one_who_finds_out_at_the_end_fails_too(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 60.0)
    with pytest.raises(MismatchError, match="another process writes"), sole(bucket):
        bucket.write(NOTE, b'{"id": "x"}')


def test_a_repository_of_the_hub_gets_no_commits_from_it() -> None:
    with sole(Bucket("hf://datasets/nobody/nothing")):  # nothing is asked, or it would fail offline
        pass
