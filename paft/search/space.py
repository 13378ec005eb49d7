"""What a search varies, and a trial's numbers as a merge recipe.

    method      one of ``methods``
    weight      of every adapter, in every group of layers
    density     of every adapter                      where the method has one
    lambda      the strength of the whole             where the method averages, so that weights do not set the strength
    t, gamma, ...                                     where a range is given and the method has it (t instead of weights)

A method's parameters are read from its signature, so a new method can be searched at once. Numbers are rounded to three
digits before they are used: a recipe on paper is the candidate that was scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paft.errors import UsageError
from paft.merge import methods
from paft.merge.inputs import Inputs
from paft.merge.resident import open_job
from paft.merge.settings import Signature, native
from paft.recipe import MergeRecipe

METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
RANGES = {"weight": (0.0, 1.5), "density": (0.1, 1.0), "lambda": (0.5, 2.0), "t": (0.0, 1.0)}
INSTEAD = "t"  # the parameter that takes the place of weights
Numbers = Mapping[str, float | str]


@dataclass(frozen=True)
class Space:
    """``groups``: (first, last) layer of each group that has weights of its own; one or none: the same weight everywhere."""

    adapters: tuple[str, ...]
    base: str
    methods: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]]
    groups: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    def numbers_of(self, method: str) -> list[str]:
        """What one method needs: ``weight.0`` of the first adapter, ``weight.0.2`` of it in the third group, ..."""
        signature, found = native(method), []
        if INSTEAD not in signature.defaults:
            groups = [f".{group}" for group in range(len(self.groups))] if len(self.groups) > 1 else [""]
            found += [f"weight.{i}{group}" for i in range(len(self.adapters)) for group in groups]
        for key in self.ranges:
            if key in signature.defaults and (key != "lambda" or _averages(signature)):
                found += [f"{key}.{i}" for i in range(len(self.adapters))] if key in signature.each else [key]
        return found

    def range_of(self, number: str) -> tuple[float, float]:
        return self.ranges[number.partition(".")[0]]

    def suggest(self, trial: Any) -> MergeRecipe:
        """The recipe that an Optuna trial asks for."""
        method = trial.suggest_categorical("method", self.methods)
        numbers = {name: trial.suggest_float(name, *self.range_of(name)) for name in self.numbers_of(method)}
        return self.recipe(method, numbers)

    def recipe(self, method: str, numbers: Mapping[str, float]) -> MergeRecipe:
        """``numbers`` as the recipe that `paft merge -c` takes."""
        count = range(len(self.adapters))
        parameters: dict[str, Any] = {}
        for name, value in numbers.items():
            key, *places = name.split(".")
            if key != "weight" and places:
                parameters.setdefault(key, []).append(_short(value))
            elif key != "weight":
                parameters[key] = _short(value)
        said: dict[str, Any] = {"method": method, "base": self.base, "adapters": list(self.adapters), "parameters": parameters,
                                "seed": self.seed}
        if "weight.0" in numbers:
            said["weights"] = [_short(numbers[f"weight.{i}"]) for i in count]
        elif "weight.0.0" in numbers:
            said["adapters"] = [{"adapter": self.adapters[i], "weight": self._by_layers(i, numbers)} for i in count]
        return MergeRecipe(**said)

    def _by_layers(self, adapter: int, numbers: Mapping[str, float]) -> list[dict[str, Any]]:
        """One rule a group, and their mean for what lies outside the layers."""
        values = [_short(numbers[f"weight.{adapter}.{group}"]) for group in range(len(self.groups))]
        rules: list[dict[str, Any]] = [{"layers": str(first) if first == last else f"{first}-{last}", "value": value}
                                       for (first, last), value in zip(self.groups, values, strict=True)]
        return [*rules, {"value": _short(sum(values) / len(values))}]

    def anchors(self) -> list[dict[str, Any]]:
        """What every study tries first: each adapter alone, and all of them in full by every method."""
        found = [self._anchor(self.methods[0], {f"weight.{i}": float(i == one) for i in range(len(self.adapters))})
                 for one in range(len(self.adapters)) if INSTEAD not in native(self.methods[0]).defaults]
        return found + [self._anchor(method, {"density": 0.5, INSTEAD: 0.5}) for method in self.methods]

    def _anchor(self, method: str, values: Mapping[str, float]) -> dict[str, Any]:
        found: dict[str, Any] = {"method": method}
        for name in self.numbers_of(method):
            low, high = self.range_of(name)
            value = next((value for key, value in values.items() if name == key or name.startswith(f"{key}.")), 1.0)
            found[name] = min(max(value, low), high)
        return found

    def check(self, inputs: Inputs) -> None:
        """Let every method refuse the ends of its ranges before the first trial; raises as `engine.merge` does."""
        for method in self.methods:
            for end in (0, 1):
                open_job(self.recipe(method, {name: self.range_of(name)[end] for name in self.numbers_of(method)}), inputs)


def make_space(inputs: Inputs, adapters: Sequence[str], base: str, *, chosen: Sequence[str] | None = None,
               ranges: Mapping[str, tuple[float, float]] | None = None, groups: int = 1, seed: int = 0) -> Space:
    """A checked space over opened ``inputs``. UsageError for unknown methods or ranges, or more groups than layers."""
    chosen = tuple(dict.fromkeys(chosen or METHODS))
    known = {key for method in chosen for key in methods.parameters(methods.load(method))} | {"weight"}
    for key, (low, high) in (ranges or {}).items():
        if key not in known:
            raise UsageError(f"none of the methods has {key!r}", hint="weight, or a parameter that `paft methods NAME` lists")
        if not low < high:
            raise UsageError(f"the range of {key} is empty: {low:g} to {high:g}", hint=f"--range {key}=0.1:1")
    layers = max((layer + 1 for layer in map(_layer_in(inputs), inputs.touched()) if layer is not None), default=0)
    if groups > max(1, layers):
        raise UsageError(f"{groups} groups of {layers} layers", hint=f"at most --layer-groups {max(1, layers)}")
    space = Space(tuple(adapters), base, chosen, {**RANGES, **(ranges or {})}, parted(layers, groups), seed)
    space.check(inputs)
    return space


def parted(layers: int, groups: int) -> tuple[tuple[int, int], ...]:
    """(first, last) layer of each of ``groups`` groups of as equal size as can be; none for one group."""
    edges = [round(i * layers / groups) for i in range(groups + 1)]
    return tuple((a, b - 1) for a, b in itertools.pairwise(edges)) if groups > 1 else ()


def _layer_in(inputs: Inputs) -> Any:
    from paft.merge.depth import Depth

    depth = Depth.of(inputs.base.entries)
    return lambda name: depth.place(name)[0]


def _averages(signature: Signature) -> bool:
    return signature.defaults.get("normalize") is True


def _short(value: float) -> float:
    return round(float(value), 3)
