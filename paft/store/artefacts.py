"""Finished artefacts under a URL, and under a directory of this machine that has the same tree.

    URL/adapters/sft/adapter_model.safetensors, paft.json, ...     as they are: any tool can read them there
    URL/adapters/sft/.paft-files.json                              {name: sha256} of each, written last

An artefact is there when its list is; before a file changes, the list goes. What is fetched is checked against it. Object stores
have no locks; one driver writes a URL at a time (`lease`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paft.errors import MismatchError, PaftError, UsageError
from paft.store.bucket import Bucket, is_inside, is_url
from paft.store.cache import WEIGHTS, digest_of, held, home, keep, lay
from paft.store.lease import NOTE, check_sole, sole

LIST = ".paft-files.json"


@dataclass(frozen=True)
class Store:
    """A tree of artefacts at ``url``."""

    url: str

    @cached_property
    def bucket(self) -> Bucket:
        return Bucket(self.url)

    def __str__(self) -> str:
        return self.bucket.url

    def __truediv__(self, name: str) -> Store:
        return Store(f"{self.bucket.url}/{name}")

    @property
    def here(self) -> Path:
        """Its directory on this machine."""
        return home() / "trees" / hashlib.sha256(self.bucket.url.encode()).hexdigest()[:16]

    def names(self) -> list[str]:
        """The artefacts that are there, whole."""
        return [name.removesuffix(f"/{LIST}") for name in self.bucket.files() if name.endswith(f"/{LIST}")]

    def stands(self) -> bool:
        """Is anything there, but for the note of a driver?"""
        return bool(self.bucket.files().keys() - {NOTE})

    def apart(self) -> tuple[Store, str]:
        """The tree that this directory is an artefact of, and its name there; UsageError for a whole bucket."""
        parent, _, name = self.bucket.url.rpartition("/")
        if not is_url(parent):
            raise UsageError(f"{self} has no directory above it", hint=f"name a directory in it, {self}/NAME")
        return Store(parent), name

    def push(self, name: str, directory: Path | None = None, there: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write the artefact at ``here``/NAME, or in ``directory``, under the URL; nothing where it stands there already.

        ``there``: the sha256 of files that others have put there.
        """
        own, directory = directory is None, directory or self.here / name
        found = {file.relative_to(directory).as_posix(): file for file in _files(directory)}
        digests = {each: digest_of(file) for each, file in found.items()} | dict(there)
        known = self._listed(name)
        if known == digests:
            return
        inside = self.bucket.inside(name)
        inside.remove(LIST)
        for each, file in found.items():
            if (known or {}).get(each) != digests[each]:
                inside.put(file, each)
            if own:
                keep(file, digests[each])
        for gone in (known or {}).keys() - digests.keys():
            inside.remove(gone)
        inside.write(LIST, json.dumps({"schema": 1, "files": digests}, indent=1).encode())

    def pull(self, name: str, *, weights: bool = True) -> bool:
        """Bring an artefact here, if it is there; without ``weights`` all but its tensors, where it is not here yet."""
        listed = self._listed(name)
        if listed is None:
            return False
        directory = self.here / name
        if directory.is_dir() and (not weights or _same(directory, listed)):
            return True
        wanted = {each: digest for each, digest in listed.items() if weights or not each.endswith(WEIGHTS)}
        room = directory.with_name(f".{directory.name}.pulled-{os.getpid()}")
        shutil.rmtree(room, ignore_errors=True)
        try:
            for each, digest in wanted.items():
                lay(held(self.bucket.inside(name), each, sha256=digest), room / each)
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(room, directory)
        finally:
            shutil.rmtree(room, ignore_errors=True)
        return True

    def push_file(self, name: str) -> None:
        """A file of its own, such as a table."""
        self.bucket.put(self.here / name, name)

    def pull_file(self, name: str) -> bool:
        """A file of its own, if it is there."""
        if not self.bucket.has(name):
            return False
        place = self.here / name
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_name(f".{place.name}.pulled-{os.getpid()}")
        self.bucket.get(name, scratch)
        os.replace(scratch, place)
        return True

    def remove(self, name: str) -> None:
        """Take an artefact away behind the URL, its list first; the note of its driver stays."""
        inside = self.bucket.inside(name)
        inside.remove(LIST)
        inside.clear(NOTE)
        inside.tidy()

    def _listed(self, name: str) -> dict[str, str] | None:
        inside = self.bucket.inside(name)
        if not inside.has(LIST):
            return None
        try:
            found: Any = json.loads(inside.read(LIST))["files"]
            if all(is_inside(each) and re.fullmatch("[0-9a-f]{64}", digest) for each, digest in found.items()):
                return found
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise MismatchError(f"{inside.url}/{LIST} is not a list of files", hint="remove the artefact, and make it again")


@contextmanager
def making(out: Store, *, overwrite: bool, resume: bool, dry_run: bool = False, sends: bool = True) -> Iterator[Path]:
    """A place of this machine for the artefact ``out``, which goes behind the URL when the block succeeds, its list last.

    With ``resume`` what stands there whole comes here first, and what was begun here stays; also what could not be sent.
    Of several processes only one ``sends``. Raises MismatchError where something stands behind the URL.
    """
    store, name = out.apart()
    place = store.here / name
    with sole(out.bucket) if sends and not dry_run else nullcontext():
        if sends:
            _admit(store, name, overwrite=overwrite, resume=resume, dry_run=dry_run)
        yield place
        if sends and not dry_run:
            _send(store, name, out, overwrite)


def _send(store: Store, name: str, out: Store, overwrite: bool) -> None:
    place = store.here / name
    try:
        check_sole(out.bucket)
        if overwrite or not out.bucket.has(LIST):  # of what is listed only the difference goes
            store.remove(name)
        store.push(name, place)
    except PaftError as error:
        error.hint = f"it is whole in {place}"
        raise
    shutil.rmtree(place, ignore_errors=True)


def places(url: str) -> Iterator[Path]:
    """Where `making` makes the artefact at a URL, or one that would hold it."""
    while is_url(parent := url.rpartition("/")[0]):
        yield Store(parent).here / url.rpartition("/")[2]
        url = parent


def _admit(store: Store, name: str, *, overwrite: bool, resume: bool, dry_run: bool) -> None:
    place, files = store.here / name, store.bucket.inside(name).files().keys() - {NOTE}
    if files and not overwrite:
        if not resume or (LIST not in files and not place.is_dir()):
            raise MismatchError(f"{store}/{name} is not empty", hint="choose another -o URL, or pass --overwrite")
        if LIST in files and not dry_run:
            store.pull(name)
    if not resume and not dry_run:
        shutil.rmtree(place, ignore_errors=True)


def _files(directory: Path) -> Iterator[Path]:
    yield from (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != LIST)


def _same(directory: Path, listed: dict[str, str]) -> bool:
    """Is what lies here what the list says? Sizes and hashes of what a stage made are in no cache, so they are computed."""
    found = {file.relative_to(directory).as_posix(): file for file in _files(directory)}
    return found.keys() == listed.keys() and all(digest_of(file) == listed[name] for name, file in found.items())
