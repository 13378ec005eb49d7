"""The finished files of a merge that was killed, so that `paft merge --resume` writes only the others.

    .X.partial/X/model-00001-of-00004.safetensors     a file of the output, written to its end and synced
    .X.partial/shards.json                            which files are; of each the hashes read and written, and the counts

A file counts when the merge is the same (recipe, inputs, the base's files by size and time) and its tensors still have their
hashes; anything else is written again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paft.checkpoint import Checkpoint
from paft.errors import MismatchError, PaftError
from paft.jsonfile import read_json
from paft.merge.tally import Tally
from paft.provenance import Tensors, hash_tensors, read_manifest, recorded_base, to_json

Hashes = dict[str, tuple[str, tuple[int, ...], str]]
RECORD = "shards.json"
_COUNTS = ("entries", "conflicts", "nonzero", "survived", "before", "after", "squares")


def key_of(recipe: Mapping[str, Any], inputs: Sequence[Mapping[str, str]], base: Checkpoint) -> str:
    """What a merge is: its recipe, the content of its inputs, and the base's files as they lie there."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in base.files]
    return hashlib.sha256(json.dumps([recipe, inputs, files], sort_keys=True, default=str).encode()).hexdigest()


def finished(out: Path, recipe: Mapping[str, Any], inputs: Sequence[Mapping[str, str]],
             base: Callable[[], str]) -> dict[str, Any] | None:
    """The report of ``out`` if this very merge has made it, None if nothing has; MismatchError for the work of another.

    ``base`` computes the content hash of the base, which is read for it.
    """
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        return None
    now = {"command": "paft merge", "recipe": recipe, "inputs": inputs}
    was, wanted = (_identity(json.loads(to_json(each))) for each in (manifest, now))
    other = next((key for key in sorted(was.keys() | wanted.keys()) if was.get(key) != wanted.get(key)), None)
    if other is None and recorded_base(out) != base():
        other = "base"
    if other:
        raise MismatchError(f"{out} is finished, and not from this: its {other} differs",
                            hint="choose another -o DIR, or pass --overwrite")
    return dict(manifest["metrics"])


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a merge is, without the names that only say where its inputs lie."""
    recipe, inputs = manifest.get("recipe"), manifest.get("inputs")
    found = {key: value for key, value in recipe.items() if key != "base"} if isinstance(recipe, dict) else {}
    if isinstance(adapters := found.get("adapters"), list):
        found["adapters"] = [{**one, "adapter": None} if isinstance(one, dict) else None for one in adapters]
    content = [{**one, "name": None} for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else None
    return {**found, "inputs": content, "command": manifest.get("command")}


@dataclass
class Shards:
    """The record beside an output that is being written; ``tallies`` are the counts of its changed tensors."""

    file: Path
    key: str
    tallies: dict[str, Tally]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, out: Path, key: str, tallies: dict[str, Tally], stands: Callable[[str], bool] | None = None) -> Shards:
        """Read the record beside ``out``, restore the counts, and remove what is not finished or not of this merge.

        Files that are elsewhere ``stands`` knows; those in ``out`` are hashed.
        """
        found = cls(out.parent / RECORD, key, tallies)
        try:
            said = read_json(found.file)
            found.done = said["files"] if said["key"] == key else {}
            for path in list(out.iterdir()):
                if path.name not in found.done:
                    path.unlink()
            whole = stands or _hashed(out, found.done)
            found.done = {name: part for name, part in found.done.items() if whole(name)}
            for part in found.done.values():
                for name, counts in part["tallies"].items():
                    vars(tallies[name]).update({count: counts[count] for count in _COUNTS})
        except (PaftError, KeyError, TypeError, AttributeError):  # none, or not ours
            found.done = {}
        for path in list(out.iterdir()):
            if path.name not in found.done:
                path.unlink()
        return found

    def of(self, file: str) -> tuple[Hashes, Hashes]:
        """The hashes that were read from the base, and written, of a finished file."""
        base, out = ({name: (about[0], tuple(about[1]), about[2]) for name, about in self.done[file][side].items()}
                     for side in ("base", "out"))
        return base, out

    def finish(self, file: str, base: Hashes, out: Hashes) -> None:
        """Record a file that is on the disk to its last byte."""
        counts = {name: {count: getattr(self.tallies[name], count) for count in _COUNTS} for name in out if name in self.tallies}
        with self.lock:
            self.done[file] = {"base": base, "out": out, "tallies": counts}
            scratch = self.file.with_suffix(".new")
            scratch.write_text(to_json({"key": self.key, "files": self.done}), encoding="utf-8")
            scratch.rename(self.file)


def _hashed(out: Path, done: Mapping[str, Mapping[str, Any]]) -> Callable[[str], bool]:
    """Whether a file in ``out`` still has the tensors that were written."""
    written = hash_tensors(out)
    return lambda file: _whole(out / file, done[file]["out"], written)


def _whole(file: Path, recorded: Mapping[str, Any], written: Tensors) -> bool:
    return file.is_file() and all(name in written and [*about] == [written[name][0], [*written[name][1]], written[name][2]]
                                  for name, about in recorded.items())
