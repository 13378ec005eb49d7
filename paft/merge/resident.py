"""A merge applied to a model in memory and undone, tensor by tensor: candidates are scored without writing a checkpoint.

    W ← the tiles that `engine.merge` would write (the same `Job`, the base read again from its files)      apply
    W ← the base's own tiles, read again                                                                    undo

So the parameters are to the bit those of the written merged model loaded from disk (of its output type, too: a bfloat16 base
is rounded to bfloat16 before it is widened), after `Resident.undo` they are those of the base, and no copy of either is held:
a tile at a time for every tensor at work. The deltas stay in their own form (a LoRA's factors), never dense.

PEFT's ``add_weighted_adapter`` keeps a candidate as one more adapter, computed on A and B apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from paft.checkpoint import FLOATS, Checkpoint
from paft.delta import TILE_ELEMENTS, tile_rows
from paft.errors import MismatchError, UsageError
from paft.merge.inputs import Inputs, open_inputs
from paft.merge.job import Job
from paft.merge.settings import Settings, native
from paft.merge.tally import Tally
from paft.merge.writer import output_dtype
from paft.models import free_cores
from paft.naming import Names
from paft.recipe import MergeRecipe


def open_job(recipe: MergeRecipe, inputs: Inputs | None = None, *, base: str | None = None, device: str = "cpu") -> Job:
    """The merge of a recipe with all numbers checked, and no tensor read. ``inputs``: its adapters, where they are open already.

    ``base`` stands in where the recipe names none; ``device`` is where deltas are computed (on another than the CPU they agree
    with the written merge to float32's rounding). Raises as `engine.merge` does.
    """
    if recipe.engine != "paft":
        raise UsageError(f"engine {recipe.engine} cannot merge in memory", hint="paft merge it, and name the directory")
    if not recipe.adapters:
        raise UsageError("the merge names no adapters", hint="list them under adapters: in the recipe")
    settings = Settings.read(native(recipe.method, recipe.dialect), recipe.adapters, recipe.parameters, recipe.weights)
    inputs = inputs or open_inputs(settings.inputs, recipe.base or base, weights=True)
    settings = settings.over(inputs.base.entries)
    dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
    job = Job(inputs, recipe.method, settings, recipe.dialect, recipe.seed, dtype, "full", TILE_ELEMENTS, free_cores(),
              rounding=recipe.rounding, device=device)
    job.check_parameters()
    return job


class Resident:
    """A base in memory, loaded from the checkpoint ``base``, to which one merge after another is applied."""

    def __init__(self, model: torch.nn.Module, base: Checkpoint) -> None:
        self.model, self.base = model, base
        self._changed: frozenset[str] = frozenset()
        self._weights = _by_file_names(model, base)

    def apply(self, job: Job) -> None:
        """Make the model the merge of ``job``, whatever merge it was before; on an error it is the base again.

        Raises MismatchError for another base, where the running model has no parameter of a changed tensor's name and shape
        (a mixture's experts, which transformers joins), and as `engine.merge` does.
        """
        self._check(job)
        rounded = frozenset(name for name, entry in self.base.entries.items()
                            if name in self._weights and entry.is_float and FLOATS[entry.dtype] != output_dtype(entry, job.dtype))
        changed = job.touched | rounded
        before, self._changed = self._changed, self._changed | changed
        try:
            self._each(before - changed, self._restore)
            self._each(rounded - job.touched, partial(self._restore, dtype=job.dtype))
            self._each(job.touched, partial(self._merge, job.with_trims()))
        except BaseException:
            self.undo()
            raise
        self._changed = changed

    def undo(self) -> None:
        """Make the model the base again, byte for byte."""
        self._each(self._changed, self._restore)
        self._changed = frozenset()

    @contextmanager
    def merged(self, job: Job) -> Iterator[Any]:
        """The model as the merge of ``job``; the base again at the end of the block."""
        self.apply(job)
        try:
            yield self.model
        finally:
            self.undo()

    def _check(self, job: Job) -> None:
        if job.inputs.base.path.resolve() != self.base.path.resolve():
            raise MismatchError(f"the merge is over {job.inputs.base_name}, not over the model in memory",
                                hint=f"set its base to {self.base.path}")
        for name in sorted(job.touched):
            weight, entry = self._weights.get(name), self.base.entries[name]
            if weight is None or weight.numel() != entry.rows * entry.columns:
                raise MismatchError(f"the running model has no parameter {name} of shape {list(entry.shape)}",
                                    hint="paft merge it, and name the directory")

    def _each(self, names: frozenset[str], work: Any) -> None:
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(free_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for job in [pool.submit(work, name) for name in sorted(names)]:
                    job.result()
        finally:
            torch.set_num_threads(before)

    def _merge(self, job: Job, name: str) -> None:
        row, weight = 0, self._rows(name)
        for tile in job.merged(self.base.entries[name], partial(self.base.tile, name), Tally(job.inputs.names)):
            weight[row : row + len(tile)].copy_(tile)
            row += len(tile)

    def _restore(self, name: str, dtype: torch.dtype | None = None) -> None:
        entry, weight = self.base.entries[name], self._rows(name)
        step = tile_rows(entry.columns, TILE_ELEMENTS)
        for start in range(0, entry.rows, step):
            stop = min(start + step, entry.rows)
            tile = self.base.tile(name, start, stop)
            weight[start:stop].copy_(tile if dtype is None else tile.to(dtype))

    def _rows(self, name: str) -> torch.Tensor:
        entry = self.base.entries[name]
        return self._weights[name].view(entry.rows, entry.columns)


def _by_file_names(model: torch.nn.Module, base: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's tensors by the names that the base's files have for them."""
    state = model.state_dict()
    if base.entries.keys() <= state.keys():
        return {name: state[name] for name in base.entries}
    names = Names(base, base.path.name, None)
    return {found: tensor for name, tensor in state.items() if (found := names.look(name)) is not None}
