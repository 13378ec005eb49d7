"""Hostile inputs for `reliability.py` and `tests/test_fuzz.py`: each is made from (kind, seed) alone, so that it can be
made again. The property of every one: the reader takes it or raises a `PaftError` with exit code 2, 3, 4 or 5; in 5 s; with at
most 1 GB more memory (the caller sets RLIMIT_AS); and nothing is written.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_inputs import make_adapter, make_artefact, make_base, make_delta, make_recipe, make_rows

SECONDS = 5.0

class Hang(BaseException):
    """An input took longer than `SECONDS`."""


@dataclass
class Count:
    """What became of the inputs of one kind."""

    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def probe_merge(room: Path) -> None:
    """Read all of every delta, as a merge does."""
    from paft.delta import spans
    from paft.errors import PaftError
    from paft.merge.inputs import open_inputs

    with contextlib.suppress(PaftError):  # the base that the adapter names
        open_inputs([str(room / "adapter")], None)
    opened = open_inputs([str(room / "adapter")], str(room / "base"))
    for delta in opened.deltas:
        for name in delta.names:
            tensor = delta.tensor(name)
            for start, stop in spans(tensor):
                tensor.tile(start, stop)


def probe_base(room: Path) -> None:
    from paft.checkpoint import Checkpoint
    from paft.delta import tile_rows

    base = Checkpoint.open(room / "base")
    for name, entry in base.entries.items():
        step = tile_rows(entry.columns, 1 << 18)
        for start in range(0, entry.rows, step) if entry.is_float else ():
            base.tile(name, start, min(start + step, entry.rows))


def probe_recipe(room: Path) -> None:
    from paft.catalog import kind_of
    from paft.cli.mergefile import read_recipe
    from paft.recipe import KINDS, RunRecipe, load
    from paft.runplan import check

    file = room / "recipe.yaml"
    kind = kind_of(file)
    if kind == "merge":
        read_recipe(file, (), (), {})
        return
    recipe = load(KINDS[kind], file)
    if isinstance(recipe, RunRecipe):
        check(recipe)


def probe_rows(room: Path) -> None:
    from paft.data.load import load_rows

    [file] = room.iterdir()
    load_rows(str(file), "pref" if b"chosen" in file.read_bytes() else "sft")


def probe_artefact(room: Path) -> None:
    from paft.verify import verify_tree

    verify_tree(room / "base")


def probe_command(room: Path) -> None:
    """The same through the command line: the exit code is the property."""
    from paft.cli import invoke
    from paft.errors import PaftError

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = invoke(["merge", str(room / "adapter"), "--base", str(room / "base"), "-o", str(room / "out"), "--dry-run", "-q",
                       "--method", "linear"])
    lines = said.getvalue().splitlines()
    if code not in (0, 2, 3, 4, 5) or len(lines) > 2 or any(not line.isprintable() for line in lines):
        raise AssertionError(f"exit {code}: {said.getvalue()[:500]}")
    if code:
        raise type("Refused", (PaftError,), {"exit_code": code})("refused")


Make, Probe = Callable[[Path, random.Random], None], Callable[[Path], None]
KINDS: dict[str, tuple[Make, Probe, int]] = {  # what makes it, what reads it, its share of the inputs
    "base: header, index, config": (make_base, probe_base, 28),
    "adapter: tensors, config": (make_adapter, probe_merge, 25),
    "delta file": (make_delta, probe_merge, 10),
    "recipe": (make_recipe, probe_recipe, 12),
    "data rows": (make_rows, probe_rows, 15),
    "artefact to verify": (make_artefact, probe_artefact, 8),
    "merge, by command": (make_adapter, probe_command, 2),
}


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises `Hang` when the block takes longer."""
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one(kind: str, seed: int, count: Count, *, keep: Path | None = None) -> None:
    """Make one input and let it be read; a fault is recorded with its seed, and its files are kept in ``keep``."""
    from paft.errors import PaftError

    make, probe, _ = KINDS[kind]
    room = Path(tempfile.mkdtemp(prefix="paft-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        make(room, random.Random(f"{kind} {seed}"))
        before, started, said = sorted(room.rglob("*")), time.perf_counter(), ""
        try:
            with alarm(SECONDS):
                probe(room)
            outcome = "taken"
        except PaftError as error:
            outcome = f"refused, {error.exit_code}"
            said = "" if error.exit_code in (2, 3, 4, 5) and "\n" not in error.message else traceback.format_exc()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            outcome, said = type(error).__name__, traceback.format_exc()
        spent = time.perf_counter() - started
        if sorted(room.rglob("*")) != before:
            said += f"\nwritten: {set(room.rglob('*')) - set(before)}"
        count.inputs, count.seconds, count.slowest = count.inputs + 1, count.seconds + spent, max(count.slowest, spent)
        count.outcomes[outcome] += 1
        if said:
            count.faults.append(f"{kind} {seed}: {said}")
            if keep is not None:
                shutil.copytree(room, keep / f"{kind.split(':')[0].replace(' ', '-')}-{seed}", dirs_exist_ok=True, symlinks=True)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def warm_up() -> None:
    """Load every library that a probe needs, so that the time and memory of an input are its own."""
    from kills import preload

    preload()
    for kind in KINDS:
        for seed in range(3):
            with contextlib.suppress(Exception):
                one(kind, -1 - seed, Count())
