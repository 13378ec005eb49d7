"""A job for every part of a delta, some of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol, TypeVar

import torch

from paft.models import free_cores

ALONE = 1 << 22  # entries below which threads cost more than they save
Progress = Callable[[int, int, str], None]


class Sized(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def entries(self) -> int: ...


S = TypeVar("S", bound=Sized)
T = TypeVar("T")


def each(parts: Sequence[S], work: Callable[[S], T], threads: int | None = None, progress: Progress | None = None) -> list[T]:
    """``work`` of every part, in their order; ``threads`` at a time (one a core), each with one thread of torch.

    ``progress(done, total, name)`` is told of each as it ends. The first error ends the others.
    """
    threads = 1 if sum(part.entries for part in parts) < ALONE else threads or free_cores()
    found: list[T] = []
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(1)
        pool = stack.enter_context(ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)))
        jobs = [pool.submit(work, part) for part in parts]
        try:
            for part, job in zip(parts, jobs, strict=True):
                found.append(job.result())
                if progress:
                    progress(len(found), len(parts), part.name)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return found
