"""mergekit's file as plain checked values with their places: which models, which parameters. Nothing is interpreted yet.

Every key is known or an error with its line; values are numbers, booleans and words, gradients (lists of these) and
conditions ``{filter, value}``. What paft cannot do (slices, modules, tokenizers) is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from paft import hub
from paft.errors import PaftError, UsageError, did_you_mean
from paft.merge.rules import Loc
from paft.yamlfile import Document

KEYS = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "tokenizer", "chat_template")
ITSELF = "run mergekit itself for this"
_REFUSED = {
    "modules": "paft merges whole models",
    "tokenizer": "paft keeps the base's tokenizer and never re-orders embeddings",
    "chat_template": "paft keeps the base's chat template",
}
_CUT = "slices that cut or stack layers are not supported: paft merges whole models"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Ref:
    """``MODEL`` or ``MODEL+ADAPTER``."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else self.model

    @property
    def input(self) -> str:
        """What paft merges: the adapter, or the full model."""
        return self.lora or self.model

    @property
    def is_adapter(self) -> bool:
        return self.lora is not None or os.path.isfile(os.path.join(os.path.expanduser(self.model), "adapter_config.json"))


@dataclass(frozen=True)
class Parameter:
    """One parameter as the file gives it, and where."""

    key: str
    value: Any
    loc: Loc


@dataclass(frozen=True)
class Member:
    """One model of the file, with what is said about it alone."""

    ref: Ref
    loc: Loc
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Config:
    """The whole file. ``parameters`` are those of the whole merge; ``dtype`` is that of the result."""

    source: Source
    method: str
    base_model: Ref | None
    members: list[Member]
    parameters: tuple[Parameter, ...]
    dtype: str | None
    tokenizer_source: Any


@dataclass(frozen=True)
class Source:
    """The document, to blame its lines."""

    document: Document

    def fail(self, loc: Loc, message: str, hint: str | None = None) -> NoReturn:
        raise UsageError(f"{self.document.where(loc)}: {message}", hint=hint)

    def section(self, node: Any, loc: Loc, known: tuple[str, ...] = ()) -> Mapping[str, Any]:
        """``node`` as a mapping, with only ``known`` keys if any are given."""
        if not isinstance(node, Mapping):
            self.fail(loc, f"{'.'.join(map(str, loc))} should be a section of keys and values, not {str(node)[:60]!r}")
        for key in node:
            if known and key not in known:
                self.fail((*loc, key), f"unknown key {key!r}", did_you_mean(str(key), known))
        return node

    def ref(self, value: Any, loc: Loc) -> Ref:
        """``MODEL[@REVISION][+ADAPTER]``, or mergekit's long form of it."""
        if isinstance(value, Mapping):
            if "path" in self.section(value, loc, ("model", "lora", "path", "revision")):
                return Ref("@".join(str(value[key]) for key in ("path", "revision") if value.get(key)))
            model, lora = (self.ref(value[key], (*loc, key)).model if value.get(key) else None for key in ("model", "lora"))
            return Ref(model, lora) if model else self.fail(loc, "this names no model")
        if not isinstance(value, str) or not value:
            self.fail(loc, f"a model is named by its path or hub id, not {value!r}")
        model, plus, lora = ("", "", "") if os.path.isdir(os.path.expanduser(value)) else value.partition("+")
        if plus and (not model or not lora or "+" in lora):
            self.fail(loc, f"{value!r} is not MODEL+ADAPTER")
        return Ref(model, lora) if plus else Ref(value)

    def parameters(self, node: Any, loc: Loc) -> tuple[Parameter, ...]:
        """A ``parameters`` section; values stay as they are but are known to be well formed."""
        found = []
        for key, value in self.section(node or {}, loc).items():
            self._check(value, (*loc, key))
            found.append(Parameter(str(key), value, (*loc, key)))
        return tuple(found)

    def _check(self, value: Any, loc: Loc, *, inside: bool = False) -> None:
        if isinstance(value, Mapping):
            self.section(value, loc, ("value", "filter"))
            if inside or "value" not in value:
                self.fail(loc, "a condition has one value, or a gradient", "{filter: mlp, value: 0.5}")
            if not isinstance(value.get("filter", "*"), str):
                self.fail((*loc, "filter"), f"filter {value['filter']!r} is no part of a tensor's name")
            self._check(value["value"], (*loc, "value"), inside=True)
        elif isinstance(value, list):
            conditions = [isinstance(one, Mapping) for one in value]
            if not value or any(conditions) != all(conditions) or any(isinstance(one, list) for one in value):
                self.fail(loc, f"{loc[-1]} should be a value, a gradient [0, 0.5, 1], or a list of conditions")
            for i, one in enumerate(value):
                self._check(one, (*loc, i), inside=inside)
        elif not isinstance(value, bool | int | float | str):
            self.fail(loc, f"{loc[-1]} has no value")


def parse(document: Document) -> Config:
    """Check the whole file; raises UsageError with the line of the first thing that is wrong or not supported."""
    source, data = Source(document), document.data
    source.section(data, (), KEYS)
    for key, why in _REFUSED.items():
        if data.get(key) is not None:
            source.fail((key,), f"{key} is not supported: {why}", ITSELF)
    if data.get("merge_method") is None:
        source.fail(("merge_method",), "the file names no merge_method", "merge_method: ties")
    given = [key for key in ("models", "slices") if data.get(key) is not None]
    if len(given) != 1:
        source.fail(tuple(given[1:]), "the file should have either models or slices", "models: [...]")
    parameters = source.parameters(data.get("parameters"), ("parameters",))
    if given == ["models"]:
        members = _models(source, data["models"], ("models",), ("model", "parameters"))
    else:
        members, more = _slice(source, data["slices"])
        twice = {one.key for one in parameters} & {one.key for one in more}
        for one in more:
            if one.key in twice:
                source.fail(one.loc, f"{one.key} is given for the whole merge as well", "give it once")
        parameters += more
    base = source.ref(data["base_model"], ("base_model",)) if data.get("base_model") is not None else None
    return Config(source, str(data["merge_method"]), base, members, parameters, _dtype(source), data.get("tokenizer_source"))


def _models(source: Source, nodes: Any, loc: Loc, known: tuple[str, ...]) -> list[Member]:
    if not isinstance(nodes, list) or not nodes:
        source.fail(loc, f"{loc[-1]} should be a list of models")
    found: list[Member] = []
    for i, node in enumerate(nodes):
        here = (*loc, i)
        if "model" not in source.section(node, here, known):
            source.fail(here, "this entry names no model", "model: BASE+ADAPTER, or a model's path")
        ref = source.ref(node["model"], (*here, "model"))
        if any(ref == other.ref for other in found):
            source.fail(here, f"{ref} is listed twice", "raise its weight instead")
        found.append(Member(ref, here, source.parameters(node.get("parameters"), (*here, "parameters"))))
    return found


def _slice(source: Source, nodes: Any) -> tuple[list[Member], tuple[Parameter, ...]]:
    """The models of a single slice that is the whole model, which is the same as ``models``, and its parameters."""
    if not isinstance(nodes, list) or len(nodes) != 1:
        source.fail(("slices",), _CUT, ITSELF)
    node = source.section(nodes[0], ("slices", 0), ("sources", "parameters", "base_model", "residual_weight"))
    for key in ("base_model", "residual_weight"):
        if node.get(key) is not None and node[key] != source.document.data.get(key):
            source.fail(("slices", 0, key), f"{key} of a slice is not supported", ITSELF)
    at = ("slices", 0, "sources")
    members = _models(source, node.get("sources"), at, ("model", "layer_range", "parameters"))
    for i, member in enumerate(members):
        if node["sources"][i].get("layer_range") != [0, layers_of(member.ref.model)]:
            source.fail((*at, i, "layer_range"), _CUT, "for the whole model write models instead of slices")
    return members, source.parameters(node.get("parameters"), ("slices", 0, "parameters"))


def _dtype(source: Source) -> str | None:
    """The type of the result. `dtype` is that of mergekit's arithmetic as well; ours is float32 in any case."""
    for key in ("out_dtype", "dtype"):
        given = source.document.data.get(key)
        if given is not None:
            name = str(given).removeprefix("torch.")
            if name not in _DTYPES:
                source.fail((key,), f"{key} {given!r} is not supported", did_you_mean(name, _DTYPES))
            return name
    return None


def layers_of(model: str) -> int | None:
    """The number of layers in a model's configuration, None where it cannot be told."""
    try:
        config = json.loads((hub.resolve(model, patterns=hub.MODEL_FILES) / "config.json").read_text(encoding="utf-8"))
    except (PaftError, OSError, ValueError):
        return None
    return next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config), None)
