"""One merge with everything resolved: which deltas, by which method with which numbers, into which type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from paft.checkpoint import Entry
from paft.delta import BaseTensor, ProductTensor, Tiled, ZeroTensor, tile_rows
from paft.errors import UsageError
from paft.merge import methods, writer
from paft.merge.deltas import Source
from paft.merge.device import making, moved
from paft.merge.global_trim import Count, model_trims
from paft.merge.inputs import Inputs
from paft.merge.lowrank import Budget
from paft.merge.merged import Merged, products
from paft.merge.ops import Filter, Plan
from paft.merge.settings import Settings
from paft.merge.stochastic import Rounding
from paft.merge.tally import Tally
from paft.merge.tensor import merged_tiles
from paft.merge.writer import Read


@dataclass(frozen=True)
class Job:
    """Inputs opened, parameters complete, types known; the deltas and the plan of one tensor at a time."""

    inputs: Inputs
    method: str
    settings: Settings
    dialect: str
    seed: int
    dtype: torch.dtype | None
    output_kind: str
    elements: int
    threads: int
    budget: Budget | None = None
    rounding: str = "nearest"
    device: str = "cpu"
    trims: dict[str, list[Filter]] | None = None  # of every tensor, where the method trims over the whole model
    touched: frozenset[str] = field(init=False)
    reach: list[frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reach", [frozenset(delta.names) for delta in self.inputs.deltas])
        object.__setattr__(self, "touched", frozenset().union(*self.reach))

    def tensors(self, name: str) -> list[Tiled]:
        """One tensor's delta of every input, zero where an input does not touch it."""
        entry = self.inputs.base.entries[name]
        step = tile_rows(entry.columns, self.elements)
        found = [
            delta.tensor(name, self.elements) if name in reach else ZeroTensor(entry.rows, entry.columns, step)
            for delta, reach in zip(self.inputs.deltas, self.reach, strict=True)
        ]
        return [moved(tensor, self.device) for tensor in found]

    def plan(self, name: str, tensors: Sequence[Tiled] | None = None) -> Plan:
        """How one tensor is merged; this is where a method makes its passes over ΔW."""
        entry = self.inputs.base.entries[name]
        own = BaseTensor(name, self.inputs.base, entry.rows, entry.columns, tile_rows(entry.columns, self.elements))
        base = moved(own, self.device)
        trims = None if self.trims is None else self.trims[name]
        weights, parameters = self.settings.at(name)
        function = methods.bind(self.method, parameters, dialect=self.dialect, seed=self.seed, base=base, trims=trims)
        with making(self.device):
            return function(self.tensors(name) if tensors is None else tensors, weights)

    def check_parameters(self) -> list[Plan]:
        """Let the method refuse values (a density of 2, three adapters for SLERP) before any tensor is read.

        Returns its plans for a tensor of zeros, one for each setting that occurs over the model.
        """
        none, plans = ZeroTensor(1, 1, 1), []
        for name, weights, parameters in self.settings.distinct(self.inputs.touched()):
            function = methods.bind(self.method, parameters, dialect=self.dialect, seed=self.seed, base=none)
            try:
                plans.append(function([none] * len(weights), weights))
            except UsageError as error:
                where = f"{name}: " if self.settings.varies else ""
                raise UsageError(where + error.message, hint=error.hint) from None
        return plans

    def with_trims(self, counting: Callable[[int], Count] | None = None) -> Job:
        """The job with its thresholds over the whole model, where the method wants such: passes over all of ΔW."""
        wanted = [parameters for _, _, parameters in self.settings.distinct(self.inputs.touched())]
        return replace(self, trims=model_trims(self.inputs.deltas, wanted, self.dialect, self.elements, counting))

    def merged(self, entry: Entry, read: Read, tally: Tally) -> Iterator[torch.Tensor]:
        """The merged row tiles of one tensor in the output type; raises MismatchError when the type overflows."""
        tensors = self.tensors(entry.name)
        plan, dtype = self.plan(entry.name, tensors), writer.output_dtype(entry, self.dtype)
        rounding = Rounding(self.seed, entry.name) if self.rounding == "stochastic" else None
        return merged_tiles(entry, tensors, plan, read, dtype, tally, self.elements, rounding, self.device)

    def source(self) -> Source:
        """The merged delta itself, tensor by tensor, for the outputs that are no whole model."""
        opened, linear = self.inputs, all(plan.coefficients is not None for plan in self.check_parameters())

        def merged(name: str) -> Merged:
            tensors = self.tensors(name)
            return Merged(tensors, self.plan(name, tensors))

        def summed(name: str) -> list[ProductTensor] | None:
            return products(self.tensors(name)) if linear else None

        return Source(opened.base, opened.reference, opened.touched(), merged, summed, opened.deltas, opened.adapters)

    def recipe(self) -> dict[str, Any]:
        """The merge as a recipe that says everything, for ``paft.json`` and the card."""
        return {
            "kind": "merge",
            "method": self.method,
            "dialect": self.dialect,
            **self.settings.record(self.inputs.names),
            "base": self.inputs.base_name,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            **({} if self.rounding == "nearest" else {"rounding": self.rounding}),
            "output_kind": self.output_kind,
            **({} if self.budget is None else self.budget.named()),
            "seed": self.seed,
        }
