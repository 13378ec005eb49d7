"""A machine that fails: full disk, read-only or forbidden target, input that vanishes, little memory. Needs root for its mounts.

The property: exit code 4 or 5 (or 0 where the fault came too late), one error line, the old target untouched, nothing half-made.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kills import Tally, fingerprint, forked, half_made

NOBODY = 65534


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[Path]:
    """A mount point beside the world, gone afterwards."""
    place = Path(arguments[-1])
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def commands(room: Path) -> dict[str, list[str]]:
    """What meets the faults; ``-o`` follows."""
    steps = ["--set", "trainer.max_steps=2", "--set", "trainer.save_steps=1", "-q"]
    pair = [str(room / "one"), str(room / "two")]
    return {
        "merge": ["merge", *pair, "-q"],
        "merge to an adapter": ["merge", *pair, "--method", "linear", "--output-kind", "lora", "-q"],
        "delta": ["delta", str(room / "one"), "-q"],
        "train-sft": ["train-sft", "-m", str(room / "base"), "-d", str(room / "chat.jsonl"), *steps],
    }


def strike(name: str, arguments: list[str], parent: Path, old: Path | None, codes: tuple[int, ...], tally: Tally,
           prepare: Callable[[], Any] | None = None) -> None:
    """One command under one fault; ``old`` is what stands at the target and must stay as it is."""
    out, said = parent / "out", Path(tempfile.gettempdir()) / f"paft-faults-{os.getpid()}"
    if old is not None:
        shutil.copytree(old, out)
    before = fingerprint(out) if old is not None else {}
    more = ["--overwrite"] if old is not None else []
    said.unlink(missing_ok=True)
    said.touch(0o666)
    said.chmod(0o666)
    code = forked([*arguments, "-o", str(out), *more], prepare=prepare, said=said)
    lines = [line for line in said.read_text().splitlines() if line.startswith(("error: ", "Traceback"))]
    tally.outcomes[f"exit {code}"] += 1
    tally.kills += 1
    wrong = []
    if code not in (*codes, 0):
        wrong.append(f"exits {code}, not {codes}")
    if code and (len(lines) != 1 or lines[0].startswith("Traceback")):
        wrong.append("does not say so in one line")
    if code and (fingerprint(out) if out.exists() else {}) != before:
        wrong.append("touched the target")
    wrong += half_made(out)
    left = [path.name for path in parent.iterdir() if path.name != "out"] if code else []
    if [each for each in left if each != "out.partial"]:
        wrong.append(f"left {left}")
    tally.faults += [f"{name}: {each}: {said.read_text()[-300:]}" for each in wrong]
    said.unlink()


def full_disk(room: Path, rng: random.Random, tally: Tally, cases: int) -> None:
    """A tmpfs of a random size below what the output takes, or a limit on the size of a file."""
    for name, arguments in commands(room).items():
        for _ in range(cases):
            with mounted("-t", "tmpfs", "-o", f"size={rng.randrange(8, 120)}k", "tmpfs", str(room / "small")) as disk:
                parent = disk / "inner"
                parent.mkdir()
                strike(f"full disk: {name}", arguments, parent, None, (5,), tally)


def file_limit(room: Path, rng: random.Random, tally: Tally, cases: int) -> None:
    for name, arguments in commands(room).items():
        for case in range(cases):
            parent = fresh(room / "limited")
            limit = rng.randrange(1000, 60_000)
            strike(f"file limit: {name}", arguments, parent, room / "old" if case % 2 else None, (5,), tally,
                   lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            shutil.rmtree(parent)


def read_only(room: Path, rng: random.Random, tally: Tally, cases: int) -> None:
    for name, arguments in commands(room).items():
        source = fresh(room / "source")
        with mounted("--bind", "-o", "ro", str(source), str(room / "read-only")) as disk:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True, capture_output=True)
            strike(f"read-only: {name}", arguments, disk, None, (4, 5), tally)
        shutil.rmtree(source)


def forbidden(room: Path, rng: random.Random, tally: Tally, cases: int) -> None:
    """As another user: a target that may not be written, an input that may not be read."""
    for name, arguments in commands(room).items():
        parent = fresh(room / "root's")
        strike(f"no permission to write: {name}", arguments, parent, None, (4,), tally, lambda: os.setuid(NOBODY))
        shutil.rmtree(parent)
        parent = fresh(room / "anybody's")
        parent.chmod(0o777)
        locked = [room / "one" / "adapter_model.safetensors", room / "base" / "model.safetensors"]
        for file in locked:
            file.chmod(0o000)
        try:
            strike(f"no permission to read: {name}", arguments, parent, None, (4,), tally, lambda: os.setuid(NOBODY))
        finally:
            for file in locked:
                file.chmod(0o644)
        shutil.rmtree(parent)


def vanishing(room: Path, rng: random.Random, tally: Tally, cases: int) -> None:
    """An input file goes while the command reads."""
    for name, arguments in commands(room).items():
        for _ in range(cases):
            copy, parent = room / "copy", fresh(room / "vanishing")
            copy.mkdir()
            for part in ("base", "one", "two"):
                shutil.copytree(room / part, copy / part)
            shutil.copy(room / "chat.jsonl", copy)
            there = [each.replace(str(room), str(copy)) if each.startswith(str(room)) else each for each in arguments]
            victim = rng.choice(["base/model.safetensors", "base/config.json", "one/adapter_model.safetensors"])
            delay = rng.uniform(0, 1.2 if name.startswith("train") else 0.15)
            timer = threading.Thread(target=lambda v=copy / victim, d=delay: (time.sleep(d), v.unlink()))
            timer.start()
            strike(f"vanishing {victim}: {name}", there + (["--base", str(copy / "base")] if "train" not in name else []), parent,
                   None, (4, 5), tally)
            timer.join()
            shutil.rmtree(copy)
            shutil.rmtree(parent)


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


FAULTS: dict[str, tuple[Callable[[Path, random.Random, Tally, int], None], int]] = {
    "full disk (tmpfs)": (full_disk, 5), "limit of a file's size": (file_limit, 4), "read-only target": (read_only, 1),
    "permission denied": (forbidden, 1), "file vanishing mid-read": (vanishing, 5),
}


def run(room: Path, seed: int = 0, scale: float = 1.0) -> dict[str, Tally]:
    """Every fault; a mount that is not allowed leaves its row out."""
    done = forked(["merge", str(room / "one"), str(room / "two"), "-o", str(room / "old"), "-q"])
    assert done == 0, done
    tallies = {}
    for name, (fault, cases) in FAULTS.items():
        tally = Tally(outcomes=Counter())
        try:
            fault(room, random.Random(f"{seed} {name}"), tally, max(1, round(cases * scale)))
        except (subprocess.CalledProcessError, PermissionError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        tallies[name] = tally
    return tallies
