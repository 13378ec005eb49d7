"""The merge methods by name. A method is a pure function ``(deltas of one tensor, weights, *, parameters) -> Plan``.

Names, defaults and help come from each function's signature and docstring. Four keyword names are not parameters but
are handed in by the engine where a signature has them: ``dialect``, ``seed``, ``base`` (the base's tensor, as tiles) and
``trims`` (what `global_trim.model_trims` found over the whole model: one filter per delta of the tensor, or None). Listing the
names imports nothing heavy.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from paft.errors import UsageError, did_you_mean

METHODS = {
    "linear": "paft.merge.methods.linear:linear",
    "task_arithmetic": "paft.merge.methods.task_arithmetic:task_arithmetic",
    "slerp": "paft.merge.methods.slerp:slerp",
    "nuslerp": "paft.merge.methods.nuslerp:nuslerp",
    "multislerp": "paft.merge.methods.multislerp:multislerp",
    "karcher": "paft.merge.methods.karcher:karcher",
    "model_stock": "paft.merge.methods.model_stock:model_stock",
    "ties": "paft.merge.methods.ties:ties",
    "sce": "paft.merge.methods.sce:sce",
    "dare_linear": "paft.merge.methods.dare_linear:dare_linear",
    "dare_ties": "paft.merge.methods.dare_ties:dare_ties",
    "della_linear": "paft.merge.methods.della_linear:della_linear",
    "della": "paft.merge.methods.della:della",
    "breadcrumbs": "paft.merge.methods.breadcrumbs:breadcrumbs",
    "breadcrumbs_ties": "paft.merge.methods.breadcrumbs_ties:breadcrumbs_ties",
    "magnitude_prune": "paft.merge.methods.magnitude_prune:magnitude_prune",
    "ram": "paft.merge.methods.ram:ram",
    "ramplus_tl": "paft.merge.methods.ramplus_tl:ramplus_tl",
    "nearswap": "paft.merge.methods.nearswap:nearswap",
}
HANDED_IN = ("dialect", "seed", "base", "trims")

Method = Callable[..., Any]


def names() -> list[str]:
    """Every method's name."""
    return list(METHODS)


def load(name: str) -> Method:
    """The function of a method; raises UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"there is no merge method {name!r}", hint=did_you_mean(name, METHODS))
    module, _, function = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def parameters(function: Method) -> dict[str, Any]:
    """A method's parameters and their defaults, by the names users write (``lambda``, not ``lambda_``)."""
    found = inspect.signature(function).parameters.values()
    return {p.name.rstrip("_"): p.default for p in found if p.kind is p.KEYWORD_ONLY and p.name not in HANDED_IN}


def describe(name: str) -> dict[str, Any]:
    """What `paft methods NAME` prints: ``name``, ``summary``, ``doc``, ``parameters`` with defaults, ``dialects``."""
    from paft.merge.ops import DIALECTS

    function = load(name)
    doc = inspect.getdoc(function) or ""
    dialects = list(DIALECTS) if "dialect" in inspect.signature(function).parameters else []
    return {
        "name": name,
        "summary": doc.splitlines()[0],
        "doc": doc,
        "parameters": parameters(function),
        "dialects": dialects,
    }


def resolve(name: str, given: dict[str, Any], dialect: str = "mergekit") -> dict[str, Any]:
    """All parameters of a method with defaults filled in; UsageError for an unknown name, a wrong type or dialect."""
    from pydantic import TypeAdapter, ValidationError

    function = load(name)
    known = parameters(function)
    hints = {key.rstrip("_"): hint for key, hint in get_type_hints(function).items()}
    for key, value in given.items():
        if key not in known:
            raise UsageError(f"{name} has no parameter {key!r}", hint=did_you_mean(key, [*known, "weight"]))
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            raise UsageError(
                f"{key}={value!r} does not fit {name}: {error.errors()[0]['msg']}", hint=f"see `paft methods {name}`"
            ) from error
    if dialect != "mergekit" and "dialect" not in inspect.signature(function).parameters:
        raise UsageError(f"{name} is the same in every dialect", hint=f"leave out the dialect {dialect!r}")
    return {**known, **given}


def bind(name: str, resolved: dict[str, Any], **handed_in: Any) -> Method:
    """The method with its parameters and those of `HANDED_IN` that its signature asks for."""
    function = load(name)
    accepted = inspect.signature(function).parameters
    keywords = {key if key in accepted else f"{key}_": value for key, value in resolved.items()}
    keywords |= {key: value for key, value in handed_in.items() if key in accepted}
    return lambda deltas, weights: function(deltas, weights, **keywords)
