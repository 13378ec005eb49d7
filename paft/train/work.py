"""`OUT.partial/`: what a training keeps beside its target until it is done, and what ``--resume`` goes on from.

    OUT.partial/begun.json           what is being made: command, recipe, hashes of base and data, versions
    OUT.partial/log.jsonl            grows while the training runs
    OUT.partial/checkpoint-N/        transformers' checkpoint (weights, optimiser, schedule, RNG) and our `progress.json`

All the while it holds the `paft.target.claim` on OUT, so that nothing else is written there.
It vanishes when OUT stands, and on an error or an interrupt before the first checkpoint; a checkpoint goes only when OUT stands
or with ``--overwrite``. A resumed training must have the recipe, base and data that ``begun.json`` names; paths may differ, since
they only say where things lie.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paft.errors import MismatchError, ResourceError
from paft.progress import say
from paft.provenance import MANIFEST, read_manifest, versions
from paft.target import check_target, claim, hold, no_room, release

BEGUN = "begun.json"
PROGRESS = "progress.json"  # the last file of a checkpoint that is written: without it the checkpoint is not whole
# Of files, which are compared by content.
PLACES = ("model", "on", "data", "eval_data", "sft_data", "pref_data", "sft_eval_data", "pref_eval_data")


def read_log(log: Path) -> list[dict[str, Any]]:
    """What a training has logged, none without a log; MismatchError where it is not JSON objects, one a line."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        found: list[Any] = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        found = [None]
    if not all(isinstance(each, dict) for each in found):
        raise MismatchError(f"{log} is not a log of JSON objects, one a line", hint="train again")
    return found


def leads() -> bool:
    """Is this the process that writes? Under `accelerate launch` or torchrun only the first one is."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Work:
    """The directory of one training, and the checkpoint that it goes on from (None: from the start)."""

    directory: Path
    room: Path | None = None  # of the claim on the target
    checkpoint: Path | None = None
    spent: float = 0.0  # seconds of the earlier processes, up to the checkpoint
    started: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        return self.directory / "log.jsonl"

    def join(self) -> None:
        """In a process that follows: go on from where the first one does, which has prepared the directory by now."""
        if not leads():
            self.checkpoint = newest(self.directory)

    @property
    def wall(self) -> float:
        """Seconds of training, over all processes that had a part in it."""
        return self.spent + time.monotonic() - self.started


def place(out: Path) -> Path:
    """Where the training of ``out`` works."""
    return out.with_name(out.name + ".partial")


def finished(out: Path, begun: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of ``out`` if it is what ``begun`` would make, None if there is none; MismatchError if it is another's."""
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest and (other := difference(manifest, begun)):
        raise MismatchError(f"{out} is finished, and not from this: {other}", hint="choose another -o DIR, or pass --overwrite")
    return manifest


def difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str | None:
    """The first thing in which two trainings differ, in words; None if they are the same."""
    first, second = _flat(_identity(one)), _flat(_identity(two))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            shown = [str(each.get(key))[:40] for each in (first, second)]
            return f"{key.removeprefix('recipe.')} was {shown[0]}, and is {shown[1]}"
    return None


def _identity(described: Mapping[str, Any]) -> dict[str, Any]:
    base = described["base"]
    recipe = {key: value for key, value in described["recipe"].items() if key not in PLACES}
    return {"command": described["command"], "recipe": recipe, "data": described["inputs"], "base": base["content_sha256"],
            "on": base.get("on", {}).get("content_sha256"), "reference": described.get("reference_sha256")}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: json.loads(json.dumps(value, default=str))}
    nested = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for each in nested for key, inner in each.items()}


@contextmanager
def work_dir(out: Path, begun: Mapping[str, Any], *, resume: bool, overwrite: bool, quiet: bool = False) -> Iterator[Work]:
    """The place to train in; with ``resume`` it goes on from the newest checkpoint there, else a checkpoint stands in the way.

    With ``resume`` and ``overwrite`` both, what was begun otherwise is thrown away. Raises MismatchError for a place that is in
    use, or that holds the checkpoint of another training.
    """
    directory = place(out)
    if not leads():
        yield Work(directory)
        return
    with claim(Path(os.path.realpath(out))) as room:
        check_target(out, overwrite=overwrite)  # it may have been made since
        directory.mkdir(parents=True, exist_ok=True)
        work = Work(directory, room, _choose(out, begun, resume=resume, overwrite=overwrite, quiet=quiet))
        try:
            _prepare(work, begun)
            yield work
        except BaseException as error:
            checkpoint = newest(directory)
            if not _of_use(directory):
                shutil.rmtree(directory, ignore_errors=True)
            _explain(error, directory, checkpoint)
            raise
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def turn_at(directory: Path, *, quiet: bool = False) -> Iterator[None]:
    """Wait until no other process makes what lies in ``directory``; one that is launched as several does not wait.

    There the first would wait and the others not.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = hold(os.open(directory, os.O_RDONLY))
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"waiting for the process that trains in {directory}", quiet=quiet)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        release(lock)
        with suppress(OSError):
            directory.rmdir()  # where nothing was made


def _explain(error: BaseException, directory: Path, checkpoint: Path | None) -> None:
    """Say of an interrupt and of a full disk what is left, and how to go on."""
    if checkpoint is not None and isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(f"interrupted; {directory} keeps step {step_of(checkpoint)}",
                                "the same command with --resume goes on from there") from None
    if full := no_room(error):
        for path in directory.glob("checkpoint-*"):
            if not whole(path):
                shutil.rmtree(path, ignore_errors=True)
        kept = f"the same command with --resume goes on from step {step_of(checkpoint)}" if checkpoint else "nothing was kept"
        raise ResourceError(f"{full} while training in {directory}", hint=f"free some space; {kept}") from error


def _choose(out: Path, begun: Mapping[str, Any], *, resume: bool, overwrite: bool, quiet: bool) -> Path | None:
    """The checkpoint to go on from, if there is one and it may be used; MismatchError if it stands in the way."""
    directory = place(out)
    checkpoint = newest(directory)
    if checkpoint is None:
        if resume and not _of_use(directory):
            say(f"note: {directory} holds no checkpoint; starting at the beginning", quiet=quiet)
        return None
    if not resume:
        if overwrite:
            return None
        raise MismatchError(f"{directory} holds an unfinished training, at step {step_of(checkpoint)}",
                            hint="pass --resume to finish it, or --overwrite to start again")
    was = json.loads((directory / BEGUN).read_text(encoding="utf-8"))
    if other := difference(was, begun):
        if overwrite:
            return None
        raise MismatchError(f"{directory} was begun otherwise: {other}", hint="undo that, or pass --overwrite to start again")
    moved = [name for name, version in versions().items() if was["versions"].get(name) != version]
    if moved:
        say(f"note: other versions than before of {', '.join(moved)}: the rest may differ from an unbroken run", quiet=quiet)
    say(f"resuming at step {step_of(checkpoint)}", quiet=quiet)
    return checkpoint


def _prepare(work: Work, begun: Mapping[str, Any]) -> None:
    """Bring the directory to the state of the checkpoint: nothing later, no doubled line in the log."""
    for path in work.directory.glob("checkpoint-*"):
        if work.checkpoint is None or not whole(path) or step_of(path) > step_of(work.checkpoint):
            shutil.rmtree(path)
    if work.checkpoint is None:
        work.log.write_text("")
        text = json.dumps({**begun, "versions": versions()}, indent=1, default=str)
        (work.directory / BEGUN).write_text(text + "\n", encoding="utf-8")
        return
    progress = json.loads((work.checkpoint / PROGRESS).read_text())
    work.spent = progress["wall_s"]
    with work.log.open("r+b") as file:
        file.truncate(progress["log_bytes"])


def newest(directory: Path) -> Path | None:
    """The last whole checkpoint from which steps are left to do."""
    found = [path for path in directory.glob("checkpoint-*") if whole(path) and not _at_the_end(path)]
    return max(found, key=step_of, default=None)


def _of_use(directory: Path) -> bool:
    """Does it hold a checkpoint, of this training or of its reference's, or a reference that was trained to its end?"""
    return any(newest(path) for path in (directory, *directory.glob("*.partial"))) or any(directory.glob(f"*/{MANIFEST}"))


def step_of(checkpoint: Path) -> int:
    """The optimiser steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def whole(checkpoint: Path) -> bool:
    """Was the checkpoint written to its end?"""
    return (checkpoint / PROGRESS).is_file()


def _at_the_end(checkpoint: Path) -> bool:
    """`Trainer` would take a step too many from here; the checkpoint before leads to the same end."""
    control = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["TrainerControl"]
    return control["args"]["should_training_stop"]
