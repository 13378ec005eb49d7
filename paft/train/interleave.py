"""Several trainings in one process that take turns, an optimiser step each, over one resident copy of the base.

    base (frozen, one copy) ──> twin + adapter 1 + optimiser 1 ──┐
                            └──> twin + adapter 2 + optimiser 2 ──┴──> step, step, step, ... in turn

Only one training computes at a time, so what is added to the memory of one is the other's adapter and optimiser. Random
generators and accelerate's state belong to a process; each training finds its own again at its turn, so that its result
is that of a run alone, to the bit. Neither TRL nor accelerate can do this with two trainers.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback

T = TypeVar("T")
Turn = Callable[[], None]
_BORGS = (AcceleratorState, GradientState, PartialState)  # every instance of such a class is one dictionary


class _Stopped(BaseException):
    """Ends a training because another one failed."""


def twin(model: Any) -> Any:
    """A copy of a model whose parameters and buffers are the same tensors; its modules can be wrapped on their own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def interleave(jobs: Sequence[Callable[[Turn], T]]) -> list[T]:
    """Run ``job(turn)`` for each job, one at a time; ``turn()`` lets the next one go on. Results are in the order of ``jobs``.

    The first error stops the others at their next turn, and is raised.
    """
    table = _Table(len(jobs), torch.get_num_threads())
    threads = [threading.Thread(target=table.sit, args=(seat, job), daemon=True) for seat, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt reaches this thread only
        table.stop()
        for thread in threads:
            thread.join()
        raise
    if table.error is not None:
        raise table.error
    return [table.results[seat] for seat in range(len(jobs))]


@dataclass(frozen=True)
class Seat:
    """A training's place among several: the resident base, which it adapts a twin of, and the word that its turn is over."""

    base: Any
    turn: Turn


class TakeTurns(TrainerCallback):
    """Calls ``turn`` after every optimiser step, when the gradients are gone."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn()


class _Table:
    """Who is at work, who is still there, and what they left."""

    def __init__(self, seats: int, cores: int) -> None:
        self.present, self.current, self.cores = list(range(seats)), 0, cores
        self.changed, self.stopped = threading.Condition(), False
        self.results: dict[int, Any] = {}
        self.error: BaseException | None = None
        self.start = _remember()

    def sit(self, seat: int, job: Callable[[Turn], Any]) -> None:
        torch.set_num_threads(self.cores)  # a number that belongs to a thread, and that results depend on
        try:
            self._wait(seat)
            _restore(self.start)
            self.results[seat] = job(lambda: self._turn(seat))
        except _Stopped:
            pass
        except BaseException as error:
            self.error, self.stopped = self.error or error, True
        finally:
            with self.changed:
                following = self._after(seat)
                self.present.remove(seat)
                self.current = following
                self.changed.notify_all()

    def stop(self) -> None:
        self.stopped = True

    def _turn(self, seat: int) -> None:
        if self.stopped:
            raise _Stopped
        if len(self.present) == 1:
            return
        state = _remember()
        with self.changed:
            self.current = self._after(seat)
            self.changed.notify_all()
        self._wait(seat)
        _restore(state)

    def _wait(self, seat: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.current == seat)
        if self.stopped:
            raise _Stopped

    def _after(self, seat: int) -> int:
        place = self.present.index(seat)
        return self.present[(place + 1) % len(self.present)]


def _remember() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    shared = [dict(kind._shared_state) for kind in _BORGS]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, shared


def _restore(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda, shared = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    for kind, content in zip(_BORGS, shared, strict=True):
        kind._shared_state.clear()
        kind._shared_state.update(content)
