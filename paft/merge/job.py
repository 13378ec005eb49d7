"""One merge with everything resolved: which deltas, by which method with which numbers, into which type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paft.checkpoint import Entry
from paft.delta import BaseTensor, ProductTensor, Tiled, ZeroTensor, tile_rows
from paft.errors import UsageError
from paft.merge import methods, writer
from paft.merge.deltas import Source
from paft.merge.inputs import Inputs
from paft.merge.lowrank import Budget
from paft.merge.merged import Merged, products
from paft.merge.ops import Filter, Plan
from paft.merge.tally import Tally
from paft.merge.tensor import merged_tiles
from paft.merge.writer import Read


@dataclass(frozen=True)
class Job:
    """Inputs opened, parameters complete, types known; the deltas and the plan of one tensor at a time."""

    inputs: Inputs
    method: str
    parameters: dict[str, Any]
    weights: list[float]
    dialect: str
    seed: int
    dtype: torch.dtype | None
    output_kind: str
    elements: int
    threads: int
    budget: Budget | None = None
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
        return [
            delta.tensor(name, self.elements) if name in reach else ZeroTensor(entry.rows, entry.columns, step)
            for delta, reach in zip(self.inputs.deltas, self.reach, strict=True)
        ]

    def plan(self, name: str, tensors: Sequence[Tiled] | None = None) -> Plan:
        """How one tensor is merged; this is where a method makes its passes over ΔW."""
        entry = self.inputs.base.entries[name]
        base = BaseTensor(name, self.inputs.base, entry.rows, entry.columns, tile_rows(entry.columns, self.elements))
        trims = None if self.trims is None else self.trims[name]
        function = methods.bind(self.method, self.parameters, dialect=self.dialect, seed=self.seed, base=base, trims=trims)
        return function(self.tensors(name) if tensors is None else tensors, self.weights)

    def check_parameters(self) -> Plan:
        """Let the method refuse values (a density of 2, three adapters for SLERP) before any tensor is read."""
        none = ZeroTensor(1, 1, 1)
        function = methods.bind(self.method, self.parameters, dialect=self.dialect, seed=self.seed, base=none)
        return function([none] * len(self.weights), self.weights)

    def merged(self, entry: Entry, read: Read, tally: Tally) -> Iterator[torch.Tensor]:
        """The merged row tiles of one tensor in the output type; raises MismatchError when the type overflows."""
        tensors = self.tensors(entry.name)
        plan, dtype = self.plan(entry.name, tensors), writer.output_dtype(entry, self.dtype)
        return merged_tiles(entry, tensors, plan, read, dtype, tally, self.elements)

    def source(self) -> Source:
        """The merged delta itself, tensor by tensor, for the outputs that are no whole model."""
        opened, linear = self.inputs, self.check_parameters().coefficients is not None

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
            "parameters": self.parameters,
            "weights": self.weights,
            "adapters": self.inputs.names,
            "base": self.inputs.base_name,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "output_kind": self.output_kind,
            **({} if self.budget is None else self.budget.named()),
            "seed": self.seed,
        }


def weights_of(weights: Sequence[float] | None, alias: Any, count: int) -> list[float]:
    if alias is not None:
        if weights is not None:
            raise UsageError("weights are given twice", hint="use either --weights or -p weight=")
        weights = alias if isinstance(alias, Sequence) and not isinstance(alias, str) else [alias] * count
    values = [1.0] * count if weights is None else list(weights)
    if len(values) != count:
        raise UsageError(f"{len(values)} weights for {count} inputs", hint="give one weight for each input")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"a weight must be a finite number, not {value!r}")
    return [float(value) for value in values]
