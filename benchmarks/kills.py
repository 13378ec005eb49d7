"""kill -9 at random moments over train, merge and run: is what stands complete, and is what is finished afterwards the same?

Libraries are loaded once; every command runs in a fork of this process, so that a tiny training takes a second and not ten.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TIMED = ("paft.json", "log.jsonl", "README.md", "report.json", "report.md")  # what holds seconds of its own
RUN = {
    "kind": "run", "name": "tiny", "evaluate": {"rows": 4, "split": "validation"},
    "defaults": {kind: {"lora": {"r": 2, "alpha": 4}, "trainer": {"max_steps": 3, "per_device_train_batch_size": 2,
                                                                  "save_steps": 1, "max_length": 32}} for kind in ("sft", "dpo")},
    "train": {"sft": {"objective": "sft"}, "dpo": {"objective": "dpo"}},
    "merge": {"ties": {"of": ["sft", "dpo"], "method": "ties"}, "linear": {"of": ["sft", "dpo"], "method": "linear"}},
}  # fmt: skip


@dataclass
class Tally:
    """What became of the kills of one command."""

    kills: int = 0
    before: int = 0  # of them, those that struck before the command had ended
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def make_world(room: Path) -> Path:
    """A tiny base, its data, two adapters and a run's recipe."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from conftest import save_base
    from datakit import chat_rows, pair_rows, write_jsonl

    room.mkdir(parents=True, exist_ok=True)
    save_base(room / "base", tied=False)
    write_jsonl(room / "chat.jsonl", chat_rows(160))
    write_jsonl(room / "pairs.jsonl", pair_rows(160))
    recipe = RUN | {"model": str(room / "base"), "data": {"sft": str(room / "chat.jsonl"), "pref": str(room / "pairs.jsonl")}}
    (room / "run.yaml").write_text(yaml.safe_dump(recipe))
    for name, kind, data in (("one", "train-sft", "chat"), ("two", "train-dpo", "pairs")):
        done = forked([kind, "-m", str(room / "base"), "-d", str(room / f"{data}.jsonl"), "-o", str(room / name), "-q",
                       "--set", "trainer.max_steps=2", "--set", "trainer.learning_rate=0.01"], modules=room / "modules")
        assert done == 0, f"{kind} exits {done}"
        load_like(room / "modules")
    merged = ["merge", str(room / "one"), str(room / "two"), "--method", "linear", "-o", str(room / "merged"), "-q"]
    assert forked(merged, modules=room / "modules") == 0
    load_like(room / "modules")
    return room


def load_like(modules: Path) -> None:
    """Load what a fork had loaded in the end: one that has become another user may not read the libraries."""
    for name in modules.read_text().split():
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def commands(room: Path) -> dict[str, list[str]]:
    """The commands that are killed; ``-o`` follows."""
    steps = ["--set", "trainer.max_steps=4", "--set", "trainer.save_steps=1", "-q", "--resume"]
    return {
        "train-sft": ["train-sft", "-m", str(room / "base"), "-d", str(room / "chat.jsonl"), *steps, "--l1", "1e-3"],
        "train-dpo": ["train-dpo", "-m", str(room / "base"), "-d", str(room / "pairs.jsonl"), *steps],
        "merge": ["merge", str(room / "one"), str(room / "two"), "--method", "dare_ties", "-p", "density=0.5", "-q", "--resume"],
        "run": ["run", str(room / "run.yaml"), "-q", "--resume", "--workers", "1"],
    }


def forked(arguments: list[str], *, kill_after: float | None = None, prepare: Callable[[], Any] | None = None,
           said: Path | None = None, modules: Path | None = None) -> int:
    """The exit code of a command in a fork of this process, or -9 where it was killed ``kill_after`` seconds."""
    child = os.fork()
    if not child:
        code = 70
        with contextlib.suppress(BaseException):
            out = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            if prepare:
                prepare()
            from paft.cli import invoke

            code = invoke(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            if modules:
                modules.write_text("\n".join(sys.modules))
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def fingerprint(out: Path) -> dict[str, str]:
    """sha256 of every file but those that hold times."""
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*")) if path.is_file() and path.name not in TIMED and path.suffix != ".png"}


def half_made(out: Path) -> list[str]:
    """Everything with a manifest that is not what it says; a run's own stands only when all is there."""
    from paft.verify import verify_tree

    found = []
    for manifest in sorted(out.rglob("paft.json")) if out.exists() else ():
        inner = manifest.parent.relative_to(out).parts
        if any(part.startswith(".") or part.endswith(".partial") for part in inner):
            continue
        with contextlib.suppress(ValueError):
            json.loads(manifest.read_text())
            found += verify_tree(manifest.parent)["differences"]
            continue
        found.append(f"{manifest} is cut")
    return found


def kill_one(name: str, arguments: list[str], out: Path, seconds: float, wanted: dict[str, str], rng: random.Random,
             tally: Tally) -> None:
    """Kill a command one to three times, let it finish, and compare with the undisturbed one."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        code = forked([*arguments, "-o", str(out)], kill_after=rng.uniform(0, seconds))
        tally.kills += 1
        tally.before += code == -signal.SIGKILL
        tally.faults += [f"{name}: after a kill: {line}" for line in half_made(out)]
        if code == 0:
            break
    said = out.with_name("said")
    code = forked([*arguments, "-o", str(out)], said=said)
    if code:
        tally.faults.append(f"{name}: the command after the kill exits {code}: {said.read_text()[-300:]}")
    got = fingerprint(out) if out.exists() else {}
    differ = sorted({key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)})
    if differ:
        tally.faults.append(f"{name}: {', '.join(differ[:4])} differ from the undisturbed result")
    left = [path.name for path in out.parent.iterdir() if path.name not in (out.name, "said")]
    if left:
        tally.faults.append(f"{name}: left beside the result: {left}")
    tally.outcomes["same" if not differ else "differs"] += 1
    shutil.rmtree(out.parent)
    out.parent.mkdir()


def soak(room: Path, kills: dict[str, int], seed: int = 0) -> dict[str, Tally]:
    """``kills`` of each command by name; the moments are uniform over the time that the undisturbed command takes."""
    tallies = {}
    for name, arguments in commands(room).items():
        place = room / f"killed-{name}"
        place.mkdir()
        out, rng, tally = place / "out", random.Random(f"{seed} {name}"), Tally()
        started = time.monotonic()
        code = forked([*arguments, "-o", str(out)], said=room / "said")
        seconds = time.monotonic() - started
        assert code == 0, f"{name} exits {code}: {(room / 'said').read_text()[-500:]}"
        wanted = fingerprint(out)
        shutil.rmtree(out)
        while tally.kills < kills.get(name, 0):
            kill_one(name, arguments, out, seconds, wanted, rng, tally)
        tallies[name] = tally
    return tallies


def preload() -> None:
    """Load what every command needs, once."""
    import tty  # noqa: F401

    import torch

    from paft.models import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
