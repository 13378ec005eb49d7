"""One process at a time writes a target, and what a dead one left behind is cleaned up or put back."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paft.errors import MismatchError
from paft.target import claim, output_dir, set_aside

HOLD = """
import sys, time
from pathlib import Path
from paft.target import output_dir
with output_dir(Path(sys.argv[1]), overwrite=True) as directory:
    (directory / "half").write_text("x")
    print("in", flush=True)
    sys.stdin.read()
"""
DIE = """
import os, signal, sys
from pathlib import Path
from paft import target
real, left = os.rename, int(sys.argv[2])
def rename(*paths):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(*paths)
os.rename = rename
with target.output_dir(Path(sys.argv[1]), overwrite=True) as directory:
    (directory / "file").write_text("new")

"""


def names(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


@contextmanager
def holder(target: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(target)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "in\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("overwrite", [False, True])
def test_while_one_process_writes_the_other_stops_and_touches_nothing(overwrite: bool, tmp_path: Path) -> None:
    with holder(tmp_path / "out") as process:
        before = names(tmp_path)
        with pytest.raises(MismatchError, match="another process is writing"), output_dir(tmp_path / "out", overwrite=overwrite):
            raise AssertionError("worked")
        assert names(tmp_path) == before
        process.communicate("")
        assert process.returncode == 0
    assert names(tmp_path) == ["out", "out/half"]


def test_the_loser_of_two_in_one_process_stops_too(tmp_path: Path) -> None:
    with output_dir(tmp_path / "out") as directory:
        (directory / "file").touch()
        with pytest.raises(MismatchError, match="another process"), output_dir(tmp_path / "out"):
            raise AssertionError("worked")
    assert names(tmp_path) == ["out", "out/file"]


def test_what_a_killed_process_left_goes_when_the_next_one_begins(tmp_path: Path) -> None:
    with holder(tmp_path / "out") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == [".out.partial", ".out.partial/lock", ".out.partial/out", ".out.partial/out/half"]
    with output_dir(tmp_path / "out") as directory:
        assert names(directory) == []
        (directory / "file").touch()
    assert names(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replacement_killed_at_any_rename_loses_nothing(renames: int, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", DIE, str(target), str(renames)])
    assert done.returncode in (-signal.SIGKILL, 0)
    with claim(target):
        assert (target / "file").read_text() == ("new" if renames == 2 else "old")
    with output_dir(target, overwrite=True) as directory:
        (directory / "file").write_text("newer")
    assert names(tmp_path) == ["out", "out/file"] and (target / "file").read_text() == "newer"


def test_a_target_made_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(lock: int, how: int) -> None:
        real(lock, how)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(MismatchError, match="not empty"), output_dir(tmp_path / "out"):
        raise AssertionError("worked")
    assert names(tmp_path) == ["out", "out/theirs"]


def test_a_file_system_without_locks_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(lock: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with output_dir(tmp_path / "out") as directory:
        (directory / "file").touch()
    assert names(tmp_path) == ["out", "out/file"]


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from paft.target import output_dir
with output_dir(Path(sys.argv[1])) as directory:
    if os.fork() == 0:
        os.kill(os.getppid(), signal.SIGKILL)
        print(os.getpid(), flush=True)
        sys.stdin.read()
        os._exit(0)
    signal.pause()
"""


def test_the_workers_of_a_killed_process_keep_nothing_locked(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    child = int(process.stdout.readline())
    process.wait()
    os.kill(child, 0)  # it lives on
    with output_dir(tmp_path / "out") as directory:
        (directory / "file").touch()
    process.stdin.close()
    assert names(tmp_path) == ["out", "out/file"]


def test_who_holds_the_claim_writes_in_its_room(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as room:
        with output_dir(tmp_path / "out", room=room) as directory:
            (directory / "file").touch()
        with pytest.raises(MismatchError, match="not empty"), output_dir(tmp_path / "out", room=room):
            raise AssertionError("worked")
    assert names(tmp_path) == ["out", "out/file"]


def test_a_room_that_vanishes_under_the_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.flock, []

    def flock(lock: int, how: int) -> None:
        real(lock, how)
        calls.append(lock)
        if len(calls) == 1:  # the process before has just cleaned up
            (tmp_path / ".out.partial" / "lock").unlink()
            (tmp_path / ".out.partial").rmdir()

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim(tmp_path / "out") as room:
        assert names(room) == ["lock"] and len(calls) == 2
    assert names(tmp_path) == []


# set_aside


def grown(target: Path, text: str) -> None:
    target.mkdir(exist_ok=True)
    (target / "file").write_text(text)


def test_an_overwrite_killed_while_it_grows_keeps_the_old_aside_until_another_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "run"
    grown(target, "old")
    script = ("import os, sys; from pathlib import Path; from paft.target import set_aside; p = Path(sys.argv[1])\n"
              "with set_aside(p):\n    p.mkdir(); (p / 'file').write_text('half'); os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", script, str(target)]).returncode == -signal.SIGKILL
    assert (tmp_path / ".run.old" / "run" / "file").read_text() == "old"
    with pytest.raises(RuntimeError), set_aside(target):
        grown(target, "half again")
        raise RuntimeError
    assert names(tmp_path) == ["run", "run/file"] and (target / "file").read_text() == "old"
    with set_aside(target):
        grown(target, "new")
    assert names(tmp_path) == ["run", "run/file"] and (target / "file").read_text() == "new"
