"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet. Loads neither torch nor rich."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Shows one long job: ``with Progress("SFT", 200) as show: show(done, "loss 0.41")``.

    On a terminal a single line is redrawn; in a log a line is printed at most every ``every`` seconds. Both carry an ETA from the
    mean rate so far; ``before`` of the ``total`` were done earlier, by another process.
    """

    def __init__(self, label: str, total: int, *, before: int = 0, quiet: bool = False, every: float = 15.0) -> None:
        self.label, self.total, self.before, self.quiet, self.every = label, max(total, 1), before, quiet, every
        self.terminal = sys.stderr.isatty()
        self.started = self.last = time.monotonic()
        self.width = 0

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        due = now - self.last >= (0.1 if self.terminal else self.every)
        if self.quiet or not (due or done >= self.total):
            return
        if done >= self.total and not self.terminal and now - self.started < self.every:
            return
        self.last = now
        self._draw(done, now - self.started, note)

    def _draw(self, done: int, spent: float, note: str) -> None:
        eta = spent / (done - self.before) * (self.total - done) if done > self.before else float("nan")
        if self.terminal:
            text = f"{done}/{self.total}  {_clock(eta)} left  {note}"
            room = 77 - len(text)  # a long note shortens the bar, then the label, and is cut itself at last
            size = max(8, min(20, room - 10))
            width = max(10, min(26, room - size))
            filled = round(size * done / self.total)
            line = f"{self.label[:width]:<{width}} {'━' * filled}{'╌' * (size - filled)} {text}"[:79]
            sys.stderr.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            sys.stderr.write(f"{self.label}: {done}/{self.total}, {_clock(eta)} left{', ' + note if note else ''}\n")
        sys.stderr.flush()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.terminal and self.width and not self.quiet:
            sys.stderr.write("\r" + " " * self.width + "\r")
            sys.stderr.flush()


def _clock(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}:{rest:02d}"


def say(message: str, *, quiet: bool = False) -> None:
    """One line on stderr, unless quiet."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """An estimate for people: ``about 12 min``."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
