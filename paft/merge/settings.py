"""What a merge is told, resolved for each tensor: per adapter, per layers, per module kind, and as a gradient over depth.

Any value may vary over the model (`paft.merge.rules`). A plain list is a gradient over depth in an adapter's entry, as
in mergekit; in ``parameters`` it is one value for each adapter. What an adapter's entry says goes before
``parameters``, and where nothing applies there stands the method's default, or an error if that is none:

    adapters: [{adapter: sft, weight: [1, 0.5]}, {adapter: dpo, density: {filter: mlp, value: 0.2}}]
    parameters: {density: [0.9, 0.5], lambda: {gradient: [1, 0.8]}}

`Settings.at` is a pure function of the tensor's name and of the base's, so it is the same for any order of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

from paft.errors import UsageError, did_you_mean
from paft.merge import methods
from paft.merge.depth import Depth
from paft.merge.rules import Loc, Rule, Setting, SettingError, is_listed, is_number, parse

Input = str | Mapping[str, Any]
ADAPTER = "adapter"  # the key of an entry that names its adapter
_MISS = object()


@dataclass(frozen=True)
class Signature:
    """What a method takes: ``defaults`` by name, those that ``each`` adapter may have its own of, and a check of values."""

    name: str
    defaults: Mapping[str, Any]
    each: frozenset[str]
    check: Callable[[dict[str, Any]], dict[str, Any]]


def native(method: str, dialect: str = "mergekit") -> Signature:
    """The signature of one of paft's methods; a parameter that takes a list of numbers is one of each adapter."""
    function = methods.load(method)
    hints = {key.rstrip("_"): hint for key, hint in get_type_hints(function).items()}
    defaults = methods.parameters(function)
    each = frozenset(key for key in defaults if any(get_origin(one) is list for one in get_args(hints[key])))
    return Signature(method, defaults, each, partial(methods.resolve, method, dialect=dialect))


@dataclass(frozen=True)
class Settings:
    """Weights and parameters of a merge. ``rules[i]`` are those of adapter i, ``common`` those of the whole."""

    signature: Signature
    inputs: tuple[str, ...]
    rules: tuple[Mapping[str, Setting], ...]
    common: Mapping[str, Setting]
    written: Mapping[str, Any]
    depth: Depth = field(default_factory=lambda: Depth((), {}))

    @classmethod
    def read(
        cls, signature: Signature, entries: Sequence[Input], parameters: Mapping[str, Any], weights: Sequence[Any] | None
    ) -> Settings:
        """Parse what a recipe says; SettingError for unknown names, misplaced or malformed values, wrong lengths."""
        if weights is not None and ("weight" in parameters or any(not isinstance(e, str) and "weight" in e for e in entries)):
            raise SettingError("weights are given twice", hint="give one weight for each input, in one place", loc=("weights",))
        inputs = tuple(_name_of(entry, i) for i, entry in enumerate(entries))
        own = [_own(signature, entry, i) for i, entry in enumerate(entries)]
        shared = {key: value for key, value in parameters.items() if key == "weight" or key in signature.each}
        for key, value in shared.items():
            for rules, setting in zip(own, _spread(key, value, len(inputs), ("parameters", key)), strict=True):
                rules[key] = rules.get(key, ()) + setting
        for rules, weight in zip(own, _list_of(weights, len(inputs)), strict=True):
            rules["weight"] = rules.get("weight", ()) + weight
        common: dict[str, Setting] = {}
        for key, value in parameters.items():
            if key not in signature.defaults and key not in shared:
                _check_point(signature, key, value, ("parameters", key))
            if key not in shared:
                common[key] = parse(value, ("parameters", key))
        written = {"adapters": list(entries), "parameters": dict(parameters), "weights": weights}
        settings = cls(signature, inputs, tuple(own), common, written)
        for key, rule in settings._all():
            for point in rule.points:
                _check_point(signature, key, point, rule.loc)
        signature.check({})
        return settings

    def over(self, names: Iterable[str]) -> Settings:
        """The settings of a base with these tensors; SettingError where filters or layers do not fit it."""
        depth = Depth.of(names)
        for _, rule in self._all():
            try:
                if rule.filter is not None:
                    depth.check_filter(rule.filter)
                if rule.layers is not None:
                    depth.check_layers(*rule.layers)
                if len(rule.points) > 1 and not depth.layers:
                    raise UsageError("a gradient needs layers, and the base's tensors have no numbers in their names")
            except UsageError as error:
                raise SettingError(error.message, hint=error.hint, loc=rule.loc) from None
        return replace(self, depth=depth)

    @property
    def varies(self) -> bool:
        """Does any value differ between tensors?"""
        return any(len(rule.points) > 1 or rule.filter or rule.layers for _, rule in self._all())

    def at(self, name: str) -> tuple[list[float], dict[str, Any]]:
        """(weights, all parameters) for one tensor; a parameter is a list where the adapters differ."""
        layer, depth = self.depth.place(name)
        weights = [float(self._value("weight", rules, name, layer, depth, 1.0)) for rules in self.rules]
        found = dict(self.signature.defaults)
        for key in self.common:
            found[key] = self._value(key, self.common, name, layer, depth, found[key])
        for key in self.signature.each:
            if any(key in rules for rules in self.rules):
                values = [self._value(key, rules, name, layer, depth, found[key]) for rules in self.rules]
                found[key] = values if any(value != values[0] for value in values) else values[0]
        return weights, found

    def distinct(self, names: Iterable[str]) -> Iterator[tuple[str, list[float], dict[str, Any]]]:
        """Every combination of values that occurs over ``names``, with the first tensor that has it; types checked."""
        seen: set[str] = set()
        for name in names:
            weights, parameters = self.at(name)
            key = repr((weights, sorted(parameters.items())))
            if key not in seen:
                seen.add(key)
                yield name, weights, self.signature.check(parameters)

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """``adapters``, ``parameters`` and ``weights`` for `paft.json`: as written, with defaults, inputs by ``names``."""
        entries = [name if isinstance(one, str) else {**one, ADAPTER: name}
                   for name, one in zip(names, self.written["adapters"], strict=True)]
        given = {**self.signature.defaults, **self.written["parameters"]}
        weights = [_constant(rules.get("weight", ())) for rules in self.rules]
        if None not in weights:
            entries = [_without_weight(one) for one in entries]
            given.pop("weight", None)
        return {"adapters": entries, "parameters": given, "weights": self.written["weights"] if None in weights else weights}

    def _all(self) -> Iterator[tuple[str, Rule]]:
        for scope in (self.common, *self.rules):
            for key, setting in scope.items():
                yield from ((key, rule) for rule in setting)

    def _value(
        self, key: str, rules: Mapping[str, Setting], name: str, layer: int | None, depth: float, default: Any
    ) -> Any:
        setting = rules.get(key, ())
        value = next((rule.value(depth) for rule in setting if rule.applies(name, layer)), _MISS)
        if value is not _MISS:
            return value
        if setting and (key == "weight" or default is None):
            raise SettingError(f"no {key} applies to {name}", hint="end the list with {value: ...}", loc=setting[0].loc)
        return default


def _constant(setting: Setting) -> float | None:
    """The weight that a setting gives to every tensor; None where it varies."""
    if not setting:
        return 1.0
    first = setting[0]
    return float(first.points[0]) if len(first.points) == 1 and first.filter is None and first.layers is None else None


def _without_weight(entry: Input) -> Input:
    if isinstance(entry, str):
        return entry
    rest = {key: value for key, value in entry.items() if key != "weight"}
    return rest if len(rest) > 1 else rest[ADAPTER]


# Reading


def _name_of(entry: Input, place: int) -> str:
    name = entry if isinstance(entry, str) else entry.get(ADAPTER)
    if not isinstance(name, str) or not name:
        raise SettingError(f"adapters.{place} names no adapter", hint=f"{{{ADAPTER}: PATH, weight: 1}}", loc=("adapters", place))
    return name


def _own(signature: Signature, entry: Input, place: int) -> dict[str, Setting]:
    """What an adapter's entry says for itself alone."""
    found: dict[str, Setting] = {}
    for key, value in () if isinstance(entry, str) else entry.items():
        loc: Loc = ("adapters", place, key)
        if key == "weight" or key in signature.each:
            found[key] = parse(value, loc, gradient=True)
        elif key in signature.defaults:
            raise SettingError(f"{key} is one for the whole merge", hint="put it under parameters", loc=loc)
        elif key != ADAPTER:
            hint = did_you_mean(str(key), [ADAPTER, "weight", *signature.each])
            raise SettingError(f"{signature.name} has no {key!r} of one adapter", hint=hint, loc=loc)
    return found


def _spread(key: str, value: Any, count: int, loc: Loc) -> list[Setting]:
    """A shared value as one for each adapter; a plain list is already that."""
    if not is_listed(value):
        return [parse(value, loc)] * count
    if len(value) != count:
        hint = "give one number, or one for each adapter; a gradient over depth is {gradient: [...]}"
        raise SettingError(f"{key} has {len(value)} values for {count} adapters", hint=hint, loc=loc)
    return [parse(one, (*loc, i), gradient=True) for i, one in enumerate(value)]


def _list_of(weights: Sequence[Any] | None, count: int) -> list[Setting]:
    if weights is None:
        return [()] * count
    if len(weights) != count:
        raise SettingError(f"{len(weights)} weights for {count} inputs", hint="give one weight for each input", loc=("weights",))
    return [parse(one, ("weights", i), gradient=True) for i, one in enumerate(weights)]


def _check_point(signature: Signature, key: str, point: Any, loc: Loc) -> None:
    """UsageError where a value has the wrong type for its parameter, or the method has no such parameter."""
    if (isinstance(point, float) and not math.isfinite(point)) or (key == "weight" and not is_number(point)):
        raise SettingError(f"{'a weight' if key == 'weight' else key} must be a finite number, not {point!r}", loc=loc)
    if key != "weight":
        try:
            signature.check({key: point})
        except UsageError as error:
            raise SettingError(error.message, hint=error.hint, loc=loc) from None
