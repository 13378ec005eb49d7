"""Independent jobs side by side: a small graph over worker processes, each with its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import Any

from paft.errors import ResourceError
from paft.models import free_cores, quiet_libraries

Done = Callable[[str, Any], None]
_GRACE = 5.0  # seconds that an orphan has to clean up


def run_graph(needs: Mapping[str, str | None], work: Callable[[str], Any], *, workers: int, done: Done) -> None:
    """Call ``work(name)`` for every name, after the name it needs; ``done(name, result)`` is told of each, here, as it ends.

    One worker: in this process, in the order given. More: that many processes, each with cores / workers threads and, where
    there are GPUs, one of them (worker i has GPU i modulo their number); ``work`` must pickle. The first error ends the others
    at once and is raised. Raises ResourceError when a worker is killed from outside.
    """
    if workers == 1:
        for name in needs:
            done(name, work(name))
        return
    context = multiprocessing.get_context("spawn")
    threads, places = max(1, free_cores() // workers), context.SimpleQueue()
    for place in assign(gpus(), workers):
        places.put(place)
    with ProcessPoolExecutor(workers, context, _prepare, (threads, places)) as pool:
        try:
            _drive(pool, needs, work, done)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ResourceError("a worker process was killed, most often for lack of memory",
                                    hint="pass --workers 1") from error
            raise


def _drive(pool: ProcessPoolExecutor, needs: Mapping[str, str | None], work: Callable[[str], Any], done: Done) -> None:
    waiting, finished = dict(needs), set()
    running: dict[Future[Any], str] = {}
    while waiting or running:
        for name in ready(waiting, finished, needs):
            running[pool.submit(work, name)] = name
            del waiting[name]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            done(name, future.result())
            finished.add(name)


def ready(waiting: Mapping[str, str | None], finished: Collection[str], needs: Mapping[str, str | None]) -> list[str]:
    """The waiting jobs whose predecessor, if it is one of the graph at all, has finished."""
    return [name for name, before in waiting.items() if before is None or before in finished or before not in needs]


def gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def assign(names: Sequence[str], workers: int) -> list[str | None]:
    """A GPU for each worker, in turn; None where there are none."""
    return [names[index % len(names)] if names else None for index in range(workers)]


def _prepare(threads: int, places: SimpleQueue[str | None]) -> None:
    """In a worker, before torch is imported: its share of threads, its GPU; a terminated worker cleans up after itself."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if (gpu := places.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow, daemon=True).start()
    quiet_libraries()


def _follow() -> None:
    """End with the parent: an orphan would train on, and hold the lock that ``--resume`` needs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)  # the pool's loop catches what `_leave` raises, and would wait for work for ever
        os._exit(143)


def _leave(*_: Any) -> None:
    raise SystemExit(143)
