"""A graph of jobs as Ray tasks: retried where a worker is lost, with paft's own errors, one line of progress and a log for each.

    ROOM/logs/NAME.log        what the job says, over all its attempts

A job that is tried again is called again: it finds what the attempt before has finished (a training its last checkpoint).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft.errors import PaftError, ResourceError, first_line
from paft.executor.ask import Ask
from paft.executor.cluster import check_fits, check_shared
from paft.parallel import Done, ready
from paft.progress import Progress, say
from paft.store import Store

RETRIES = 3
_STEP = re.compile(r"\S[^:]*: \d+/\d+(?=, )")  # as `Progress` writes into a log
_BEAT = 1.0  # seconds between two looks at the logs
_GRACE = 10.0  # seconds that a cancelled job has to clean up


@dataclass(frozen=True)
class Logs:
    """The logs of jobs, under a directory that every node sees, or on the disk of each and then behind a Store's URL."""

    room: Path | Store

    def of(self, name: str) -> Path:
        room = self.room.here if isinstance(self.room, Store) else self.room.absolute()
        return room / "logs" / f"{name}.log"

    def send(self, name: str) -> None:
        """Where the job ran on a node's own disk: its log behind the URL."""
        if isinstance(self.room, Store):
            with contextlib.suppress(PaftError):  # it says how a job went, and is not its result
                self.room.push_file(f"logs/{name}.log")

    @property
    def told(self) -> str:
        return f"{self.room.url if isinstance(self.room, Store) else self.room}/logs/STAGE.log"

    def last(self, name: str) -> str:
        """How far a job is, by the last line that its progress wrote: ``sft: 40/200``."""
        try:
            with self.of(name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 400))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return name
        return next((found[0][:30] for line in reversed(lines) if (found := _STEP.match(line))), name)


_TOLD: set[Logs] = set()  # those whose place was said


def run_tasks(needs: Mapping[str, str | None], work: Callable[[str], Any], *, workers: int, done: Done,
              asks: Mapping[str, Ask], logs: Logs, quiet: bool = False) -> None:
    """`parallel.run_graph` on a cluster, with what each job ``asks`` for; 0 ``workers``: as many at once as it has room for.

    A worker that is lost is replaced `RETRIES` times. The first error ends the others and is raised, a PaftError as itself.
    Raises ResourceError where no node can run a job, where a node does not see ``logs.room``, or loses the job too often.
    """
    if not needs:
        return
    import ray

    for name in needs:
        check_fits(name, asks.get(name, Ask()))
    for name in needs:
        logs.of(name).parent.mkdir(parents=True, exist_ok=True)
    check_shared(logs.room)
    if logs not in _TOLD:
        _TOLD.add(logs)
        say(f"logs: {logs.told}", quiet=quiet)
    held, running = ray.put(work), {}
    try:
        with Progress("ray", len(needs), quiet=quiet) as show:
            _drive(needs, running, lambda name: _submit(name, held, asks.get(name, Ask()), logs), workers, done, logs, show)
    except BaseException:
        _stop(list(running))
        raise


def _submit(name: str, held: Any, ask: Ask, logs: Logs) -> Any:
    import ray

    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, int(ask.cpus))
    task = ray.remote(_task).options(num_cpus=ask.cpus, num_gpus=ask.gpus, memory=int(ask.memory) or None, max_retries=RETRIES,
                                     name=f"paft {name}")
    return task.remote(held, name, os.getcwd(), logs, threads)


def _drive(needs: Mapping[str, str | None], running: dict[Any, str], submit: Callable[[str], Any], workers: int,
           done: Done, logs: Logs, show: Progress) -> None:
    import ray

    waiting, finished = dict(needs), set()
    while waiting or running:
        for name in ready(waiting, finished, needs):
            if not workers or len(running) < workers:
                running[submit(name)] = name
                del waiting[name]
        for reference in ray.wait(list(running), num_returns=1, timeout=_BEAT)[0]:
            name = running.pop(reference)
            result = _result(reference, name, logs)
            show.__exit__(None, None, None)  # the line makes room
            done(name, result)
            finished.add(name)
        show(len(finished), "; ".join(logs.last(name) for name in running.values()))


def _result(reference: Any, name: str, logs: Logs) -> Any:
    """What a job returned; its error as itself, a lost worker as a ResourceError."""
    import ray
    from ray import exceptions

    try:
        return ray.get(reference)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, PaftError | OSError | MemoryError) or type(error.cause).__name__ == "OutOfMemoryError":
            raise error.cause from None
        raise
    except exceptions.OutOfMemoryError as error:
        raise ResourceError(f"{name}: Ray ended it, because its node ran out of memory",
                            hint="say `resources: {memory: BYTES}` in its stage, or pass --workers 1") from error
    except (exceptions.WorkerCrashedError, exceptions.NodeDiedError) as error:
        raise ResourceError(f"{name}: its worker was lost {RETRIES + 1} times",
                            hint=f"see {logs.of(name)}; finished stages are kept") from error
    except exceptions.RayError as error:
        raise ResourceError(f"{name}: {type(error).__name__}: {first_line(error)}",
                            hint="ray status; finished stages are kept") from error


def _stop(running: list[Any]) -> None:
    """End jobs: first as Ctrl-C does, so that they clean up, then at once."""
    import ray

    with contextlib.suppress(Exception):  # the cluster may be what has gone
        for reference in running:
            ray.cancel(reference)
        for reference in ray.wait(running, num_returns=len(running), timeout=_GRACE)[1] if running else ():
            ray.cancel(reference, force=True)


def _task(work: Callable[[str], Any], name: str, directory: str, logs: Logs, threads: int) -> Any:
    """On a node: the driver's directory, where there is one, its share of threads, and everything that is said into the log."""
    if os.path.isdir(directory):
        os.chdir(directory)  # relative paths mean what they mean to the driver
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from paft.models import quiet_libraries

    quiet_libraries()
    import torch

    torch.set_num_threads(threads)
    log = logs.of(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name} on {socket.gethostname()}, process {os.getpid()}")
        try:
            return work(name)
        except BaseException as error:
            say(f"error: {error}")
            if not isinstance(error, PaftError):
                traceback.print_exc(file=sys.stderr)
            raise
        finally:
            file.flush()
            logs.send(name)
