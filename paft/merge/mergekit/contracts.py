"""What mergekit 0.1.5's methods take, and which of them paft computes itself.

A contract says what ``base_model`` is to a method:

    subtracted  the deltas are over it; it has no weight and is no input (ties, task_arithmetic, ...)
    optional    as subtracted, but mergekit also works on whole weights without one (nuslerp, multislerp)
    end         one of exactly two inputs: t = 0 gives it, t = 1 the other (slerp, nearswap, arcee_fusion)
    member      nothing special; where it is given it counts as one more input (linear, karcher, passthrough)

A test compares this table with mergekit's own registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from paft.errors import UsageError, did_you_mean
from paft.merge import methods
from paft.merge.rules import is_number
from paft.merge.settings import Signature, native

REQUIRED = "required"


@dataclass(frozen=True)
class Contract:
    """``each``: parameters of one model, ``shared``: those of the whole merge, with defaults. ``inert`` ones change nothing."""

    base: Literal["subtracted", "optional", "end", "member"]
    each: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    inert: frozenset[str] = frozenset({"int8_mask"})

    @property
    def known(self) -> dict[str, Any]:
        return {**self.each, **self.shared}

    @property
    def required(self) -> set[str]:
        return {key for key, default in self.known.items() if default == REQUIRED}


def _task(each: Mapping[str, Any], *, normalize: bool, rescale: bool, inert: str = "") -> Contract:
    """The family of generalised task arithmetic."""
    shared = {"int8_mask": False, "normalize": normalize, "rescale": rescale, "lambda": 1.0}
    own = {"weight": REQUIRED, "density": 1.0, **each}
    return Contract("subtracted", own, shared, frozenset({"int8_mask", *inert.split()}))


CONTRACTS = {
    "linear": Contract("member", {"weight": REQUIRED}, {"normalize": True}),
    "slerp": Contract("end", {}, {"t": REQUIRED}),
    "nuslerp": Contract("optional", {"weight": REQUIRED}, {"nuslerp_row_wise": False, "nuslerp_flatten": True}),
    "multislerp": Contract("optional", {"weight": REQUIRED}, {"normalize_weights": True, "eps": 1e-8}),
    "task_arithmetic": _task({}, normalize=False, rescale=False, inert="density rescale"),
    "ties": _task({}, normalize=True, rescale=False),
    "dare_linear": _task({}, normalize=False, rescale=True),
    "dare_ties": _task({}, normalize=False, rescale=True),
    "breadcrumbs": _task({"gamma": 0.01}, normalize=False, rescale=False),
    "breadcrumbs_ties": _task({"gamma": 0.01}, normalize=False, rescale=False),
    "della": _task({"epsilon": 0.15}, normalize=True, rescale=True),
    "della_linear": _task({"epsilon": 0.15}, normalize=False, rescale=True),
    "model_stock": Contract("subtracted", {}, {"filter_wise": False}),
    "sce": Contract("subtracted", {}, {"int8_mask": False, "select_topk": 1.0}),
    "ram": Contract("subtracted", {}, {"epsilon": 1e-5}),
    "ramplus_tl": Contract("subtracted", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "karcher": Contract("member", {}, {"max_iter": 10, "tol": 1e-5}),
    "nearswap": Contract("end", {}, {"t": REQUIRED}),
    "arcee_fusion": Contract("end"),
    "passthrough": Contract("member", {"scale": None}),
}
_SAME_IN_ANY_SPACE = ("linear",)  # the base cancels


def contract(method: str) -> Contract:
    """The contract of one of mergekit's methods; UsageError for an unknown name."""
    if method not in CONTRACTS:
        raise UsageError(f"mergekit has no method {method!r}", hint=did_you_mean(method, CONTRACTS))
    return CONTRACTS[method]


def ours(method: str) -> tuple[str, dict[str, Any]] | None:
    """(paft's name, parameters to set) of the method that computes what mergekit's does; None where paft has none.

    What mergekit computes on whole weights is ours only where our method has a ``space`` to say so.
    """
    base = contract(method).base
    if method not in methods.METHODS:
        return None
    if base in ("subtracted", "optional") or method in _SAME_IN_ANY_SPACE:
        return method, {}
    return (method, {"space": "weight"}) if "space" in native(method).defaults else None


def theirs(method: str, space: str | None) -> str | None:
    """mergekit's name of a method of ours, None where it has none: the inverse of `ours`.

    Our slerp of deltas is its nuslerp.
    """
    if (method, space) == ("slerp", "delta"):
        return "nuslerp"
    wanted = (method, {} if space is None else {"space": space})
    return next((name for name in CONTRACTS if ours(name) == wanted), None)


def signature(method: str) -> Signature:
    """A method of mergekit as what `Settings` reads; ``weight`` stays 1 where it is not given, as in paft."""
    found = contract(method)
    defaults = {key: None if value == REQUIRED else value for key, value in found.known.items() if key != "weight"}
    needed = found.required - {"weight"}

    def check(given: dict[str, Any]) -> dict[str, Any]:
        for key, value in given.items():
            if key not in defaults:
                raise UsageError(f"mergekit's {method} has no parameter {key!r}", hint=did_you_mean(key, [*found.known]))
            if not _fits(value, found.known[key]):
                raise UsageError(f"{key}={value!r} does not fit mergekit's {method}", hint=f"its default is {found.known[key]}")
        return {**defaults, **given}

    def complete(given: dict[str, Any]) -> dict[str, Any]:
        for key in needed:
            if given.get(key, ...) is None:
                raise UsageError(f"mergekit's {method} needs {key}", hint=f"-p {key}=0.5")
        return check(given)

    each = frozenset(found.each) - {"weight"}
    return Signature(method, defaults, each, complete)


def _fits(value: Any, default: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    if isinstance(default, bool):
        return all(isinstance(one, bool) for one in values)
    return all(one is None or is_number(one) for one in values)
