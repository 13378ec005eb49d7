"""One value of a recipe that may vary over the model: a number, a gradient over depth, or conditions.

    {gradient: [0.2, 0.8]}                           from the first layer to the last, straight between the given points
    {filter: mlp, layers: 0-11, value: 0.5}          where the name holds "mlp" and the layer is one of 0 to 11
    [{filter: mlp, value: [0.2, 0.8]}, {value: 1}]   the first that applies; one without filter and layers is the rest

With points v_0 .. v_m and depth t (`paft.merge.depth`), i = ⌊t·m⌋ and f = t·m - i,

    value = (1 - f) v_i + f v_{i+1}                  numbers; of words and booleans the one at i

which is mergekit's own rule, as are substring filters and the first hit. ``layers`` is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from paft.errors import UsageError, did_you_mean

Loc = tuple[int | str, ...]


class SettingError(UsageError):
    """A setting that is wrong, with the place in the recipe where it stands."""

    def __init__(self, message: str, *, hint: str | None = None, loc: Loc = ()) -> None:
        super().__init__(message, hint=hint)
        self.loc = loc


@dataclass(frozen=True)
class Rule:
    """``points`` for the tensors whose name contains ``filter`` and whose layer lies in ``layers``."""

    points: tuple[Any, ...]
    filter: str | None = None
    layers: tuple[int, int] | None = None
    loc: Loc = field(default=(), compare=False)

    def applies(self, name: str, layer: int | None) -> bool:
        inside = self.layers is None or (layer is not None and self.layers[0] <= layer <= self.layers[1])
        return inside and (self.filter is None or self.filter in name)

    def value(self, depth: float) -> Any:
        scaled = depth * (len(self.points) - 1)
        low = int(scaled)
        if len(self.points) == 1 or not all(is_number(point) for point in self.points):
            return self.points[low]
        share = scaled - low
        return (1 - share) * self.points[low] + share * self.points[min(low + 1, len(self.points) - 1)]


Setting = tuple[Rule, ...]


def parse(value: Any, loc: Loc, *, gradient: bool = False) -> Setting:
    """One setting. ``gradient``: a plain list is a gradient over depth, as it is inside conditions in any case."""
    if isinstance(value, Mapping):
        return (_condition(value, loc),)
    if _is_scalar(value):
        return (Rule((value,), loc=loc),)
    if not is_listed(value):
        return tuple(_condition(one, (*loc, i)) for i, one in enumerate(value))
    if not gradient:
        raise SettingError(f"{loc[-1]} is one for the whole merge", hint="a gradient over depth is {gradient: [...]}", loc=loc)
    return (Rule(_points(value, loc), loc=loc),)


def _condition(value: Any, loc: Loc) -> Rule:
    if not isinstance(value, Mapping):
        raise SettingError(f"{value!r} stands among conditions", hint="write it as {value: ...}", loc=loc)
    for key in value:
        if key not in ("value", "gradient", "filter", "layers"):
            hint = did_you_mean(str(key), ["value", "filter", "layers", "gradient"])
            raise SettingError(f"a condition has no {key!r}", hint=hint, loc=(*loc, key))
    if ("value" in value) == ("gradient" in value):
        raise SettingError("a condition needs a value or a gradient", hint="{filter: mlp, value: 0.5}", loc=loc)
    inner = value.get("value", value.get("gradient"))
    if isinstance(inner, Mapping) and set(inner) == {"gradient"}:
        inner = inner["gradient"]
    points = _points(inner, loc) if "gradient" in value or not _is_scalar(inner) else (inner,)
    text = value.get("filter")
    if text is not None and (not isinstance(text, str) or not text):
        raise SettingError(f"filter {text!r} is no part of a tensor's name", loc=(*loc, "filter"))
    layers = _layers(value["layers"], (*loc, "layers")) if "layers" in value else None
    return Rule(points, None if text == "*" else text, layers, loc)


def _points(value: Any, loc: Loc) -> tuple[Any, ...]:
    if not is_listed(value) or not value or not all(_is_scalar(point) for point in value):
        raise SettingError(f"a gradient is a list of values, not {value!r}", hint="{gradient: [0.2, 0.8]}", loc=loc)
    return tuple(value)


def _layers(value: Any, loc: Loc) -> tuple[int, int]:
    """``3`` or ``0-11``, both ends included."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
        raise SettingError(f"layers {value!r} are no layers", hint="layers: 3, or layers: 0-11 (both included)", loc=loc)
    return first, last


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_listed(value: Any) -> bool:
    """A list without conditions in it."""
    return isinstance(value, Sequence) and not isinstance(value, str) and not any(isinstance(one, Mapping) for one in value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str) or not isinstance(value, Mapping | Sequence)
