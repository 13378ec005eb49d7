"""A stranger's program, such as a chat template, tried out where it can take neither more than some seconds nor some memory.

`tried` runs it in a forked process with a limit on processor time and address space, which ends loops inside the interpreter
and inside a library's C code alike; an alarm or a thread would end neither `10 ** 10 ** 9` nor a text of a terabyte.
"""

from __future__ import annotations

import os
import resource
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SECONDS = 5
MEMORY = 1_000_000_000  # bytes, beyond what the process has already
_TOO_LARGE, _REFUSED = 3, 4


class Refused(Exception):
    """The program does what it may not."""


def tried(work: Callable[[], object]) -> str | None:
    """None if ``work()`` comes to an end, be it by an error, which it will raise again; else in words why it did not.

    What it returns or changes is lost.
    """
    with warnings.catch_warnings():  # of threads: the child calls none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run(work)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    if status == 0:
        return None
    said = {_REFUSED: "fails, or makes a text without end", _TOO_LARGE: f"needs more than {MEMORY / 1e9:.0f} GB of memory",
            -signal.SIGXCPU: f"takes more than {SECONDS} s"}
    return said.get(status, "ends the process")


def _run(work: Callable[[], object]) -> None:
    status = 0
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory()
        work()
    except MemoryError:
        status = _TOO_LARGE
    except Refused:
        status = _REFUSED
    except BaseException:
        pass
    finally:
        os._exit(status)


def _limit_memory() -> None:
    with suppress(OSError, ValueError):  # a system that cannot tell, or a limit that is lower already
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
