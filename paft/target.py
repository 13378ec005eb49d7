"""Outputs that are complete or absent, each written by one process at a time.

    X                  the target: it appears, or is replaced, by a rename
    .X.partial/lock    held by the process that writes X; the kernel lets go of it when that dies
    .X.partial/X       what is being written; what a dead process left there goes when the next one begins
    .X.old/X           the old X until the new one stands; the next process puts it back if this one died in between

`output_dir` writes a whole directory so; `set_aside` replaces one that grows in place, such as a run's. Whoever works long
before he writes, as a training does, holds the `claim` from his first step on and gives its room to `output_dir`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError

MANIFEST = "paft.json"
_FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit exceeded"}
_LOCK, _NEW = "lock", ".new"
_held: set[int] = set()  # open locks of this process
HELD = (errno.EWOULDBLOCK, errno.EACCES)


def _let_go() -> None:
    """In a forked process, such as a data loader's worker: it outlives a parent that was killed, whose lock it must not keep."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def no_room(error: BaseException) -> str | None:
    """In words, that an error comes from a full disk; safetensors and PyTorch tell it by a text alone."""
    said = re.search(r"os error (\d+)|(inline_container|No space left)", str(error))
    number = getattr(error, "errno", None) or (said and (int(said[1]) if said[1] else errno.ENOSPC))
    return _FULL.get(number or 0)


def check_target(target: Path, *, overwrite: bool = False, in_place: bool = False) -> None:
    """Refuse a target that exists and is not an empty directory, unless ``overwrite``; raises MismatchError.

    The current directory and what lies above it are refused always: replacing them would delete more than an artefact.
    A mount point, such as a container's volume, cannot be replaced at all; an output that grows ``in_place`` may be one.
    """
    if target.is_dir():
        if Path.cwd().resolve().is_relative_to(target.resolve()):
            raise MismatchError(f"{target} is the current directory, or above it", hint="choose another -o DIR")
        if os.path.ismount(target.resolve()) and (overwrite or not in_place):
            raise MismatchError(f"{target} is a mount point and cannot be replaced", hint="choose a directory inside it")
        if not overwrite and any(target.iterdir()):
            raise MismatchError(f"{target} is not empty", hint="choose another -o DIR, or pass --overwrite")
    elif target.exists() or target.is_symlink():
        raise MismatchError(f"{target} is a file, not a directory", hint="choose another -o DIR")


def make_parent(target: Path) -> None:
    """Make the directory that ``target`` will lie in; NotFoundError or ResourceError where nothing can be written there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except (FileExistsError, NotADirectoryError) as error:
        raise MismatchError(f"{target.parent} is a file, or lies below one", hint="choose another -o DIR") from error
    except PermissionError as error:
        raise NotFoundError(f"cannot write in {target.parent}: permission denied") from error
    except OSError as error:
        raise ResourceError(f"cannot write in {target.parent}: {error.strerror}") from error


@contextmanager
def output_dir(target: Path, *, overwrite: bool = False, resume: bool = False, room: Path | None = None) -> Iterator[Path]:
    """Yield a scratch directory that becomes ``target`` when the block succeeds and vanishes when it does not.

    With ``overwrite`` the old directory is moved aside first and removed only after the new one stands in its place. With
    ``resume`` it holds what a killed process has left there, and an interrupt or a full disk leaves it for the next. ``room``
    is that of a `claim` on ``target`` which the caller holds. Raises MismatchError where ``target`` stands in the way or
    another process writes it, ResourceError where the disk is full.
    """
    check_target(target, overwrite=overwrite)
    given, target = target, Path(os.path.realpath(target))  # where a link leads, and the scratch directory beside that
    with nullcontext(room) if room else claim(target, keep=resume) as room:
        check_target(target, overwrite=overwrite)  # it may have been made since
        scratch = room / target.name
        try:
            scratch.mkdir(exist_ok=resume)
            yield scratch
            _replace(scratch, target)
        except KeyboardInterrupt:
            if resume and any(each.name not in (_LOCK, scratch.name) for each in room.iterdir()):  # a record of what is finished
                said = f"interrupted; what is finished of {given} waits beside it"
                raise KeyboardInterrupt(said, "the same command with --resume goes on from there") from None
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        except PaftError:
            raise
        except Exception as error:
            if full := no_room(error):
                kept = "the same command with --resume goes on" if resume else "nothing was kept"
                raise ResourceError(f"{full} while writing {given}", hint=f"make room; {kept}") from error
            raise


def write_whole(file: Path, text: str) -> None:
    """``text`` as the file, which is never seen half-written; see `sweep`."""
    scratch = file.with_name(f".{file.name}{_NEW}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def sweep(directory: Path) -> None:
    """Take away what a process left in ``directory`` that died in `write_whole`."""
    for left in directory.glob(f".*{_NEW}"):
        left.unlink(missing_ok=True)


def tidy(target: Path) -> None:
    """Take away what a process left beside ``target`` that died between the rename and the end; MismatchError if it lives."""
    target = Path(os.path.realpath(target))
    if (target.parent / f".{target.name}.partial").exists():
        with claim(target):
            pass


@contextmanager
def claim(target: Path, *, keep: bool = False) -> Iterator[Path]:
    """Be the only process that writes ``target``: yields ``.X.partial``, empty but for the lock; it vanishes afterwards.

    With ``keep`` it is as it was left, and stays after an interrupt or a ResourceError.

    Raises MismatchError where another process holds it. A file system without locks gives no such protection.
    """
    make_parent(target)
    inside = os.path.ismount(target)  # a volume's parent is another disk, or nobody's to write
    room = (target if inside else target.parent) / f".{target.name}.partial"
    lock = _lock(room, target)
    kept = False
    try:
        if not keep:
            _empty(room)
        old = _aside(target)
        if old.exists() and not target.exists():
            os.rename(old, target)
        yield room
    except (KeyboardInterrupt, ResourceError):
        kept = keep
        raise
    finally:
        if not kept:
            _empty(room)
        (room / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # the next process stands in the door
            room.rmdir()
        release(lock)


def _lock(room: Path, target: Path) -> int:
    while True:
        room.mkdir(exist_ok=True)
        try:
            lock = hold(os.open(room / _LOCK, os.O_RDWR | os.O_CREAT, 0o666))
        except FileNotFoundError:  # its last owner has just removed the room
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(room / _LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in HELD:
                return lock
            release(lock)
            raise MismatchError(f"another process is writing {target}", hint="wait for it, or choose another -o DIR") from None
        release(lock)


def hold(lock: int) -> int:
    """``lock``, an open file, to be closed in every process that is forked from this one: it alone keeps what is locked."""
    _held.add(lock)
    return lock


def release(lock: int) -> None:
    _held.discard(lock)
    os.close(lock)


def _empty(room: Path) -> None:
    for left in list(room.iterdir()):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != _LOCK:
            left.unlink(missing_ok=True)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old" / target.name


def _replace(scratch: Path, target: Path) -> None:
    old = _aside(target)
    shutil.rmtree(old.parent, ignore_errors=True)
    if not target.exists():
        os.rename(scratch, target)
        return
    old.parent.mkdir()
    try:
        os.rename(target, old)
        try:
            os.rename(scratch, target)
        except BaseException:
            os.rename(old, target)
            raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


@contextmanager
def set_aside(target: Path, *, aside: bool = True) -> Iterator[None]:
    """For outputs that grow in place: the old ``target`` is moved aside, removed if the block succeeds, put back if it fails.

    The caller holds the `claim`. Where a process died in here, the half-made ``target`` goes and the old one waits on.
    """
    if not (aside and target.exists()):
        yield
        shutil.rmtree(_aside(target).parent, ignore_errors=True)
        return
    old = _aside(target)
    if old.exists() and not (target / MANIFEST).is_file():
        shutil.rmtree(target)
    else:
        shutil.rmtree(old.parent, ignore_errors=True)
        old.parent.mkdir()
        os.rename(target, old)
    try:
        yield
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(old, target)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
