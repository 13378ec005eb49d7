"""A mergekit file as a recipe of ours, with the lines of the file.

What the file says is computed as mergekit would in float32 (its dialect), from the adapters' own factors:

    dtype, out_dtype      mergekit casts the inputs to `dtype` and the result to `out_dtype`; here the arithmetic is
                          float32 in any case, and the result is rounded once to `out_dtype`, else `dtype`, else the base's
    model: BASE+ADAPTER   a LoRA on the base; an adapter's directory alone is one too; anything else is a full model
    a list of numbers     a gradient over depth; filters are substrings, the first that applies counts
    linear                Σ w_i θ_i / Σ w_i = W + Σ w_i δ_i / Σ w_i: the base cancels. Without `normalize` it does only if
                          Σ w_i = 1, else the file is refused
    slerp                 `base_model` is the end at t = 0, on whole weights (`space: weight`)
    tokenizer_source      `base` is what happens anyway where all inputs are adapters; everything else is refused

Whatever mergekit would ignore (a misspelt key, a parameter of the whole merge in one model's entry) is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from paft.errors import did_you_mean
from paft.merge.mergekit.config import ITSELF, Config, Member, Parameter, parse
from paft.merge.mergekit.contracts import CONTRACTS, REQUIRED, Contract, ours
from paft.merge.rules import Loc, is_number
from paft.merge.settings import ADAPTER, native
from paft.yamlfile import Document

BACKEND = "--engine mergekit runs mergekit on exact adapters"


def read(document: Document, *, engine: str = "paft") -> tuple[Document, list[str]]:
    """The file as a document of `paft.recipe.MergeRecipe`, and notes on what in it has no effect.

    Raises UsageError with the line for unknown or misspelt keys, for what cannot be expressed, and for a method that
    paft lacks unless ``engine`` is mergekit.
    """
    config = parse(document)
    contract, method, fixed = _method(config, engine)
    chosen, base = {"member": _with_base, "end": _two_ends}.get(contract.base, _over_base)(config, contract)
    source = config.tokenizer_source
    if source is not None and (source != "base" or not all(one.ref.is_adapter or one.ref.model == base for one in chosen)):
        why = f"tokenizer_source {source!r} is not supported: paft keeps the base's tokenizer and never re-orders embeddings"
        config.source.fail(("tokenizer_source",), why, ITSELF)
    out = _Recipe(config, contract, None if engine == "mergekit" else native(method).defaults)
    entries = [out.entry(member, i) for i, member in enumerate(chosen)]
    out.check_unused(one for one in config.members if one not in chosen)
    shared = {one.key: out.value(one, ("parameters", one.key), own=False) for one in config.parameters if out.counts(one)}
    _check_required(config, contract, chosen)
    _check_whole(config, contract, entries, shared)
    out.move(("merge_method",), ("method",))
    out.move(("base_model",), ("base",))
    parameters = {**_other_defaults(contract, out.takes), **shared, **fixed}
    data = {"kind": "merge", "method": method, "adapters": entries, "base": base, "parameters": parameters,
            "dtype": config.dtype, "engine": engine}
    return Document(data, out.lines, document.name), out.notes


def _method(config: Config, engine: str) -> tuple[Contract, str, dict[str, Any]]:
    """(contract, the recipe's method, parameters that say which of its forms is meant)."""
    name = config.method
    if name not in CONTRACTS:
        config.source.fail(("merge_method",), f"there is no merge method {name!r}", did_you_mean(name, CONTRACTS))
    if engine == "mergekit":
        return CONTRACTS[name], name, {}
    found = ours(name)
    if found is None:
        config.source.fail(("merge_method",), f"{name} is not one of paft's methods", BACKEND)
    return CONTRACTS[name], *found


# Which inputs our merge has, over which base


def _root(config: Config) -> str | None:
    """The one model that all ``MODEL+ADAPTER`` of the file name."""
    roots = {one.ref.model: one.loc for one in config.members if one.ref.lora}
    if config.base_model and config.base_model.lora:
        roots.setdefault(config.base_model.model, ("base_model",))
    if len(roots) > 1:
        config.source.fail(next(reversed(roots.values())), f"the adapters are on different bases: {', '.join(roots)}", ITSELF)
    return next(iter(roots), None)


def _over_base(config: Config, contract: Contract) -> tuple[list[Member], str | None]:
    """The base is subtracted: it is no input, whether it is listed or not."""
    base, name, root, at = config.base_model, config.method, _root(config), ("base_model",)
    if base is None:
        if contract.base == "optional":
            config.source.fail(("merge_method",), f"{name} without base_model works on whole weights", "add base_model: ...")
        if root is None and not all(one.ref.is_adapter for one in config.members):
            config.source.fail(("merge_method",), f"{name} needs base_model", "the model that the others were tuned from")
        return config.members, root
    if base.is_adapter:
        config.source.fail(at, f"{name} subtracts base_model, so it cannot be an adapter", "name the model it was trained on")
    if root not in (None, base.model):
        config.source.fail(at, f"the adapters are on {root}, but base_model is {base}")
    chosen = [one for one in config.members if one.ref != base]
    if not chosen:
        config.source.fail(at, "base_model is the only model", "list what is to be merged into it")
    return chosen, base.model


def _with_base(config: Config, contract: Contract) -> tuple[list[Member], str | None]:
    """The base is one more input. Over whose weights the deltas are taken does not matter then."""
    chosen = list(config.members)
    if config.base_model and not any(one.ref == config.base_model for one in chosen):
        chosen.append(Member(config.base_model, ("base_model",)))
    whole = [one for one in (config.base_model, *(each.ref for each in chosen)) if one and not one.is_adapter]
    return chosen, _root(config) or next((one.model for one in whole), None)


def _two_ends(config: Config, contract: Contract) -> tuple[list[Member], str | None]:
    """Two inputs, and the base is the first of them."""
    if config.base_model is None:
        config.source.fail(("merge_method",), f"{config.method} needs base_model, the end at t = 0", "base_model: one of the two")
    chosen, base = _with_base(config, contract)
    if len(chosen) != 2:
        config.source.fail(config.members[-1].loc, f"{config.method} goes between base_model and one other model")
    return sorted(chosen, key=lambda one: one.ref != config.base_model), base


# Parameters


@dataclass
class _Recipe:
    """Writes parameters into our recipe and remembers their lines."""

    config: Config
    contract: Contract
    takes: Mapping[str, Any] | None  # our method's parameters; None where mergekit itself gets them
    notes: list[str] = field(default_factory=list)
    lines: dict[tuple[str, ...], int | str] = field(default_factory=dict)

    def entry(self, member: Member, place: int) -> Any:
        """One input of our recipe, with what is said about it alone."""
        self.move(member.loc, ("adapters", place))
        for one in member.parameters:
            if one.key in self.contract.shared:
                hint = "put it under the file's own parameters; mergekit ignores it here"
                self.config.source.fail(one.loc, f"{one.key} is one for the whole merge", hint)
        said = [one for one in member.parameters if self.counts(one)]
        found = {one.key: self.value(one, ("adapters", place, one.key), own=True) for one in said}
        return {ADAPTER: member.ref.input, **found} if found else member.ref.input

    def counts(self, one: Parameter) -> bool:
        """Is this to be handed on? UsageError where mergekit has no such parameter, or paft cannot do what it says."""
        contract, method, fail = self.contract, self.config.method, self.config.source.fail
        if one.key not in contract.known:
            fail(one.loc, f"{method} has no parameter {one.key!r}", did_you_mean(one.key, contract.known))
        if self.takes is None or one.key == "weight" or one.key in self.takes:
            return True
        if one.key in contract.inert:
            if one.key != "int8_mask":  # that only saves memory
                self.note(one, f"no effect on {method}")
        elif any(point != contract.known[one.key] for point in _points(one.value)):
            fail(one.loc, f"paft's {method} has no {one.key}", BACKEND)
        return False

    def check_unused(self, members: Iterable[Member]) -> None:
        """Parameters of a base that is subtracted say nothing, but must not be misspelt either."""
        for one in (one for member in members for one in member.parameters):
            self.counts(one)
            self.note(one, "no effect on base_model")

    def note(self, one: Parameter, what: str) -> None:
        self.notes.append(f"{self.config.source.document.where(one.loc)}: {one.key} has {what}")

    def value(self, one: Parameter, target: Loc, *, own: bool) -> Any:
        """Our form of a value: a gradient is a plain list in an entry, and ``{gradient: ...}`` for the whole merge."""
        self.move(one.loc, target)
        plain = isinstance(one.value, list) and not any(isinstance(each, Mapping) for each in one.value)
        return {"gradient": one.value} if plain and not own else one.value

    def move(self, loc: Loc, target: Loc) -> None:
        """Whatever stands at ``target`` in our recipe, and below, has the line that ``loc`` has in the file."""
        source, goal = tuple(map(str, loc)), tuple(map(str, target))
        for key, line in self.config.source.document.lines.items():
            if key[: len(source)] == source:
                self.lines[(*goal, *key[len(source) :])] = line


def _points(value: Any) -> list[Any]:
    """Every single value that a setting may take."""
    if isinstance(value, Mapping):
        return _points(value["gradient" if "gradient" in value else "value"])
    return [point for one in value for point in _points(one)] if isinstance(value, list) else [value]


def _other_defaults(contract: Contract, takes: Mapping[str, Any] | None) -> dict[str, Any]:
    """mergekit's defaults where ours are other values; null is the dialect's own, which is mergekit's here."""
    given = {} if takes is None else {key: value for key, value in takes.items() if key in contract.known and value is not None}
    return {key: contract.known[key] for key, value in given.items() if contract.known[key] not in (REQUIRED, value)}


def _check_required(config: Config, contract: Contract, chosen: list[Member]) -> None:
    """mergekit has no default for weights and t, so a file without them is no merge of mergekit's."""
    shared = {one.key for one in config.parameters}
    for key in sorted(contract.required - shared):
        for member in chosen:
            if key in contract.shared or key not in {one.key for one in member.parameters}:
                loc = member.loc if key in contract.each else ("merge_method",)
                whose = f" for {member.ref}" if key in contract.each else ""
                config.source.fail(loc, f"{config.method} needs {key}{whose}", f"parameters: {{{key}: 0.5}}")


def _check_whole(config: Config, contract: Contract, entries: list[Any], shared: Mapping[str, Any]) -> None:
    """A sum of whole models is a sum of deltas only where its weights sum to one."""
    summed = contract.base == "member" and "normalize" in contract.shared
    if not summed or all(point is True for point in _points(shared.get("normalize", True))):
        return
    given = [shared.get("weight") if isinstance(one, str) else one.get("weight", shared.get("weight")) for one in entries]
    weights = [float(weight) for weight in given if is_number(weight)]
    if len(weights) != len(given) or abs(math.fsum(weights) - 1) > 1e-9:
        loc = next(one.loc for one in config.parameters if one.key == "normalize")
        config.source.fail(loc, "without normalize the base is scaled by the sum of the weights, unless that is 1",
                           "normalize: true, or task_arithmetic")
