"""Does a job fit on this machine? Asked before the work starts, since a full disk or a killed process is told hours later."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from paft.errors import ResourceError

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that this process may still use: the machine's, the container's (cgroup v2), `ulimit -v`; None where unknown."""
    found = [_available(), _container(), _limit()]
    return min((each for each in found if each is not None), default=None)


def _available() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container() -> int | None:
    said = [_lines(_CGROUP / name) for name in ("memory.max", "memory.current", "memory.stat")]
    if not all(said) or not said[0][0].isdigit():
        return None
    cached = [int(line.split()[1]) for line in said[2] if line.startswith(("inactive_file ", "active_file "))]
    return max(0, int(said[0][0]) - int(said[1][0]) + sum(cached))  # what files take is given back when needed


def _limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _lines(Path("/proc/self/statm"))
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0].split()[0]) * resource.getpagesize())


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def check_disk(target: Path, needed: float) -> None:
    """ResourceError where the disk of ``target`` has less than ``needed`` bytes free."""
    place = next(each for each in (target.absolute(), *target.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(f"{target} needs {_size(needed)} of disk, and {_size(free)} are free there",
                            hint="make room, or choose -o DIR on another disk")


def check_memory(what: str, needed: float, hint: str) -> None:
    """ResourceError where ``what`` needs more memory than there is."""
    free = free_memory()
    if free is not None and needed > free:
        raise ResourceError(f"{what} needs about {_size(needed)} of memory, and {_size(free)} are free", hint=hint)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
