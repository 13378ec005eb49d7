"""The batches of one objective, pass after pass over its rows, with a place that a checkpoint can keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import skip_first_batches
from transformers.trainer_utils import has_length

from paft.errors import MismatchError


class Batches:
    """Cycles over ``loader`` on its own. ``taken`` batches were used; batches that were only looked at come again.

    A pass begins as `Trainer` begins an epoch, so that the batches are those of a trainer that has this objective alone.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.go_to(0)

    def __len__(self) -> int:
        """Batches in a pass; 0 where that is not known."""
        return len(self.loader) if has_length(self.loader) else 0

    def peek(self, count: int) -> list[Any]:
        """The next ``count`` batches, which stay where they are."""
        with torch.random.fork_rng(devices=[]):  # see `draw`
            while len(self._held) < count:
                self._held.append(next(self._coming))
        return self._held[:count]

    def take(self, count: int) -> list[Any]:
        """The next ``count`` batches."""
        found = self.peek(count)
        del self._held[:count]
        self.begun = sum(place % len(self) == 0 for place in range(self.taken, self.taken + count)) if len(self) else 0
        self.taken += count
        return found

    def draw(self) -> None:
        """Draw what `DataLoader` does for the seeds of its workers where a pass begins: dropout draws from the same generator.

        Its own draw is undone, as it comes when a batch is fetched, which a look ahead and a resumed training do at other times.
        This one is for the first forward pass of a step: `Trainer` restores the generator after the step's batches are fetched.
        """
        for _ in range(self.begun):
            torch.empty((), dtype=torch.int64).random_()
        self.begun = 0

    def go_to(self, taken: int) -> None:
        """Go on as if ``taken`` batches had been used."""
        self.taken, self.begun = taken, 0
        self._held: list[Any] = []
        self._coming = self._from(taken)

    def _from(self, taken: int) -> Iterator[Any]:
        done, skip = divmod(taken, len(self)) if len(self) else (0, 0)
        unknown = 0 if len(self) else taken  # of rows that cannot be counted, those that were used are read again
        while True:
            empty = not skip
            for batch in self._pass(done, skip):
                empty = False
                if unknown:
                    unknown -= 1
                else:
                    yield batch
            if empty:
                raise no_batch()
            done, skip = done + 1, 0

    def _pass(self, number: int, skip: int) -> Iterator[Any]:
        _set_epoch(self.loader, number)
        loader = self.loader
        if skip:
            loader = skip_first_batches(loader, skip)
            _set_epoch(loader, number)
        yield from loader


def no_batch() -> MismatchError:
    """A data set without end of which nothing ever comes."""
    return MismatchError("a pass over the rows makes no batch: none can be used, or trainer.dataloader_drop_last drops them",
                         hint="lower trainer.per_device_train_batch_size or sft_batch_size, or leave dataloader_drop_last out")


def _set_epoch(loader: Any, number: int) -> None:
    """As `Trainer` does: accelerate does not hand it on to a batch sampler that is sharded over processes."""
    each: Any
    for each in (loader, getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)):
        if hasattr(each, "set_epoch"):
            each.set_epoch(number)
