"""A short form of `make soak`'s fuzzing: some hundred hostile inputs of each kind, and the proof that the harness can fail."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import fuzz

INPUTS = {"recipe": 120, "artefact to verify": 150}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_hostile_inputs_are_taken_or_refused(kind: str) -> None:
    count = fuzz.Count()
    for seed in range(INPUTS.get(kind, 300)):
        fuzz.one(kind, seed, count)
    assert not count.faults, count.faults[0]
    assert count.outcomes["taken"] < count.inputs or kind == "artefact to verify"  # which tells its differences


def sleep(room: Path) -> None:
    time.sleep(1)


def write(room: Path) -> None:
    (room / "new").touch()


def crash(room: Path) -> None:
    raise KeyError("x")


def eat(room: Path) -> None:
    raise MemoryError


@pytest.mark.parametrize(("probe", "said"), [(sleep, "Hang"), (write, "written"), (crash, "KeyError"), (eat, "MemoryError")])
def test_the_harness_can_fail(probe: Any, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    monkeypatch.setitem(fuzz.KINDS, "bad", (fuzz.make_base, probe, 1))
    count = fuzz.Count()
    fuzz.one("bad", 0, count, keep=tmp_path)
    assert len(count.faults) == 1 and said in count.faults[0] and any(tmp_path.iterdir())
