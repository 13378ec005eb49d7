"""The order in which rows of two kinds are read: a fixed share of either, every row of a kind before any of it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class Mixture(Sampler[int]):
    """Indices of one epoch: N = len(``second``) of them, round(N·share) with ``second`` true, shuffled.

    Epoch e brings F(e+1) − F(e) rows of the second kind, F(e) = round(e·N·share): the share holds to within one row in each epoch
    and over all of them. Each kind is read in passes of its own over all its rows, each pass in a new order; a pass that an epoch
    does not finish goes on in the next one. All of it follows from (seed, e) alone, so nothing has to be kept in a checkpoint and
    every process has the same order. ``epoch`` tells e when the reading begins: accelerate's loaders do not hand it on through
    all their layers (several processes, resumed within an epoch).
    """

    def __init__(self, second: Sequence[bool], share: float, seed: int, epoch: Callable[[], int]) -> None:
        marks = np.asarray(second, dtype=bool)
        self.kinds = [np.flatnonzero(~marks), np.flatnonzero(marks)]
        self.size, self.share, self.seed, self.epoch = len(marks), share, seed, epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        now = self.epoch()
        before, after = (math.floor(e * self.size * self.share + 0.5) for e in (now, now + 1))
        rows = np.concatenate([self._read(0, now * self.size - before, (now + 1) * self.size - after),
                               self._read(1, before, after)])
        return iter(np.random.default_rng([self.seed, 2, now]).permutation(rows).tolist())

    def _read(self, kind: int, start: int, stop: int) -> np.ndarray:
        """What stands at the places ``start`` to ``stop`` of the endless reading of one kind."""
        rows = self.kinds[kind]
        if start == stop:
            return rows[:0]
        first, last = start // len(rows), (stop - 1) // len(rows)
        passes = [np.random.default_rng([self.seed, kind, each]).permutation(rows) for each in range(first, last + 1)]
        return np.concatenate(passes)[start - first * len(rows):stop - first * len(rows)]
