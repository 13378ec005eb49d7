"""What was fetched, by its content, under ``$PAFT_CACHE`` (``~/.cache/paft``); all of it may be deleted when nothing runs.

    objects/ab/abcd...        a file, by the sha256 that is known of it, or by its URL and what the service says of its content
    fetched/abcd.../NAME      a directory behind a URL as it was: its files are links to objects; perhaps without its weights
    hashes/abcd...            the content hash of weights behind a URL, by what the service says of their content
    trees/abcd.../NAME        what is made for a URL, until it is there
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError
from paft.store.bucket import Blob, Bucket
from paft.target import no_room

WHERE = ".weights.json"  # beside what was fetched: where the weights of it are
WEIGHTS = ".safetensors"


def home() -> Path:
    """The cache of this machine; each may have its own."""
    return Path(os.environ.get("PAFT_CACHE") or os.path.expanduser("~/.cache/paft")).absolute()


def digest_of(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def held(bucket: Bucket, name: str, *, sha256: str | None = None, blob: Blob | None = None) -> Path:
    """The file ``name`` of a bucket in this cache, fetched if need be and checked where its ``sha256`` is known.

    Raises MismatchError where what comes is not what it should be.
    """
    place = _object(sha256) if sha256 else object_of(bucket, name, blob)
    if not place.is_file():
        with _scratch(place) as scratch:
            bucket.get(name, scratch)
            if blob and scratch.stat().st_size != blob.size:
                raise MismatchError(f"{bucket.url}/{name} has changed while it was read", hint="try again")
            if sha256 and digest_of(scratch) != sha256:
                raise MismatchError(f"{bucket.url}/{name} is not what was written there", hint="make the artefact again")
            os.replace(scratch, place)
    return place


def object_of(bucket: Bucket, name: str, blob: Blob | None) -> Path:
    """The place here of a file whose hash is not known."""
    key = hashlib.sha256(f"{bucket.url}/{name}\0{blob and blob.key}".encode()).hexdigest()
    return _object(key)


def _object(key: str) -> Path:
    return home() / "objects" / key[:2] / key


def keep(file: Path, sha256: str) -> None:
    """Remember a file of this machine, so that it is never fetched: a link, where the disk can."""
    place = _object(sha256)
    if not place.is_file():
        with _scratch(place) as scratch:
            lay(file, scratch)
            os.replace(scratch, place)


def lay(source: Path, target: Path) -> None:
    """``source`` as ``target``; tensors are linked, not copied, where both are on one disk: nothing writes into their files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size > 1 << 20 and target.name.endswith(WEIGHTS):
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def fetched(url: str, patterns: Sequence[str] = ("*",), *, weights: bool = True) -> Path:
    """The files behind ``url`` whose names match, as a directory here; of a URL that is one file, the file.

    It is read only. Without ``weights`` the tensors stay there (`paft.store.ranged`). NotFoundError where nothing is there.
    """
    bucket = Bucket(url)
    found = {name: blob for name, blob in bucket.files().items() if any(fnmatch.fnmatch(name, one) for one in patterns)}
    if not found:
        return _one_file(bucket)
    about = (bucket.url, weights, sorted((name, blob.key) for name, blob in found.items()))
    state = hashlib.sha256(repr(about).encode()).hexdigest()
    place = home() / "fetched" / state[:16] / PurePosixPath(bucket.url).name
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            for name, blob in found.items():
                if weights or not name.endswith(WEIGHTS):
                    lay(held(bucket, name, blob=blob), room / name)
            where = {name: [blob.size, blob.key] for name, blob in found.items() if name.endswith(WEIGHTS)}
            (place.parent / WHERE).write_text(json.dumps({"url": bucket.url, "files": where}), encoding="utf-8")
            os.replace(room, place)
        except OSError as error:
            shutil.rmtree(room, ignore_errors=True)
            if not place.is_dir():  # else another process was faster
                raise _told(error, place) from error
        except BaseException:
            shutil.rmtree(room, ignore_errors=True)
            raise
    return place


def _one_file(bucket: Bucket) -> Path:
    parent, _, name = bucket.url.rpartition("/")
    blob = Bucket(parent).files().get(name) if "://" in parent and not parent.endswith(":/") else None
    if blob is None:
        raise NotFoundError(f"nothing at {bucket.url}", hint="check the URL, and that you may list it")
    file = held(Bucket(parent), name, blob=blob)
    named = file.parent / f"{file.name}.named" / name  # readers go by the ending
    if not named.is_file():
        lay(file, named)
    return named


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A file beside ``place``, gone if it does not become that; a full disk in one line."""
    file = place.parent / f".{uuid.uuid4().hex}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield file
    except (OSError, PaftError) as error:
        if no_room(error) or isinstance(error, OSError):
            raise _told(error, place) from error
        raise
    finally:
        file.unlink(missing_ok=True)


def _told(error: BaseException, place: Path) -> ResourceError:
    return ResourceError(f"cannot write in {place.parent}: {no_room(error) or str(error)}",
                         hint="make room there, or say PAFT_CACHE=DIR")
