"""Progress goes to stderr: a redrawn line on a terminal, sparse lines in a log, nothing when quiet."""

from __future__ import annotations

import io
import sys

import pytest

from paft.progress import Progress, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr; called inside a test, because pytest puts its own stderr in place after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_terminal_line_fits_and_is_wiped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("paft.progress.time.monotonic", lambda: float(next(clock)))
    with Progress("a label that is much longer than its place", 4) as show:
        for done in range(1, 5):
            show(done, "loss 0.123  L1 4.56e+03 and more than the line can hold")
    *drawn, wiped, end = terminal.getvalue().split("\r")[1:]
    assert len(drawn) == 4
    assert all(len(line) <= 79 for line in drawn)
    assert "4/4" in drawn[-1] and drawn[-1].count("━") == 8 and "L1 4.56e+03" in drawn[-1]
    assert "0:10 left" in drawn[2]  # 30 s for three of four
    assert not wiped.strip() and len(wiped) == len(drawn[-1]) and end == ""


def test_a_log_gets_a_line_only_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("job", 1000, every=3600) as show:
        for done in range(1, 1001):
            show(done)
    with Progress("job", 3, every=0) as show:
        for done in range(1, 4):
            show(done, "note")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == ["job: 1/3", "job: 2/3", "job: 3/3"]
    assert all(line.endswith(", note") for line in err.splitlines())


def test_quiet_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with Progress("job", 3, quiet=True, every=0) as show:
        for done in range(4):
            show(done)
    say("a note", quiet=True)
    assert terminal.getvalue() == ""


def test_an_empty_job_does_not_divide_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with Progress("job", 0) as show:
        show(0)
        show(1)
    assert "1/1" in terminal.getvalue()


def test_hours_are_told_as_hours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3600.0])
    monkeypatch.setattr("paft.progress.time.monotonic", lambda: next(clock))
    Progress("job", 4, every=0)(1)
    assert "3h00m left" in capsys.readouterr().err
