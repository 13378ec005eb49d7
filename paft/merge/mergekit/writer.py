"""A merge of ours as mergekit's YAML: the same merge, or a refusal that names what mergekit cannot express.

    our method           mergekit's              because
    slerp, space delta   nuslerp, w = (1-t, t)   it interpolates task vectors
    slerp, space weight  slerp, t                base_model is the first input
    layers: 0-11         one filter per layer    mergekit has substring filters only
    [a, b] in parameters one value per model     a list is a gradient there

`dtype: float32` is always written: without it mergekit computes in the inputs' type. The adapters are exact only if
mergekit folds them in float32 as well (`--lora-merge-dtype float32`), which its YAML cannot say; the header does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from paft.checkpoint import FLOATS, Checkpoint
from paft.delta import LoraDelta
from paft.errors import MismatchError, UsageError
from paft.merge import methods
from paft.merge.depth import Depth
from paft.merge.inputs import Inputs, NoDelta
from paft.merge.mergekit.contracts import REQUIRED, Contract, contract, theirs
from paft.merge.rules import Rule, Setting
from paft.merge.settings import Settings

Rules = dict[str, Setting]


def to_yaml(settings: Settings, inputs: Inputs, *, dialect: str, dtype: str | None, engine: str) -> str:
    """The file for ``mergekit-yaml``; raises UsageError for what mergekit cannot express."""
    method, shared, each = express(settings, dialect) if engine == "paft" else (settings.signature.name, *_as_read(settings))
    base = reference(inputs.base.path, inputs.base_name)
    refs = [
        base if isinstance(delta, NoDelta) else f"{base}+{name}" if isinstance(delta, LoraDelta) else name
        for delta, name in zip(inputs.deltas, map(reference, inputs.paths, inputs.names), strict=True)
    ]
    config = compose(method, settings.depth, shared, each, base=base, models=refs, dtype=dtype or dtype_of(inputs.base))
    head = [
        f"{method} of {len(refs)} inputs, written by paft, which takes this file as it is: paft merge -c FILE",
        "With mergekit: mergekit-yaml FILE OUT --lora-merge-cache SCRATCH --lora-merge-dtype float32",
        "(without the latter it rounds every adapter to the base's type before it merges).",
    ]
    if engine == "paft" and "seed" in inspect.signature(methods.load(settings.signature.name)).parameters:
        head.append("The masks are random: mergekit draws others than paft, and neither takes its --seed from here.")
    return "".join(f"# {line}\n" for line in head) + yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def compose(
    method: str, depth: Depth, shared: Rules, each: Sequence[Rules], *, base: Any, models: Sequence[Any], dtype: str
) -> dict[str, Any]:
    """mergekit's configuration. ``base`` and ``models`` are references in any form that mergekit reads."""
    terms = contract(method)
    config: dict[str, Any] = {"merge_method": method}
    if terms.base == "end":
        config["base_model"] = models[0]
    elif terms.base != "member":
        config["base_model"] = base
        if base in models:
            raise UsageError(f"in mergekit's {method} the base is no input", hint="leave it out")
    config["models"] = []
    for model, rules in zip(models, each, strict=True):
        said = _section(terms.each, rules, depth)
        config["models"].append({"model": model} | ({"parameters": said} if said else {}))
    said = _section(terms.shared, shared, depth)
    return config | ({"parameters": said} if said else {}) | {"dtype": "float32", "out_dtype": dtype}


# Our merge in mergekit's terms


def _as_read(settings: Settings) -> tuple[Rules, list[Rules]]:
    return dict(settings.common), [dict(rules) for rules in settings.rules]


def express(settings: Settings, dialect: str) -> tuple[str, Rules, list[Rules]]:
    """(mergekit's method, parameters of the whole, parameters of each model) of a native merge."""
    ours, defaults = settings.signature.name, settings.signature.defaults
    if dialect != "mergekit":
        raise UsageError(f"mergekit cannot express the dialect {dialect!r}", hint="--dialect mergekit")
    common, each = _as_read(settings)
    spaces = {point for rule in common.pop("space", ()) for point in rule.points} or {defaults.get("space")}
    method = theirs(ours, spaces.pop()) if len(spaces) == 1 else None
    if method is None:
        raise UsageError(f"mergekit has no method that does what {ours} does here", hint="see `paft methods`")
    terms = contract(method)
    for scope in (common, *each):
        for key in [key for key in scope if key not in terms.known and key not in ("weight", "t")]:
            if any(point != defaults[key] for rule in scope.pop(key) for point in rule.points):
                raise UsageError(f"mergekit's {method} has no {key}", hint=f"leave {key} at {defaults[key]}")
    for key, default in defaults.items():
        if default is not None and terms.known.get(key, default) != default:
            common.setdefault(key, (Rule((default,)),)) if key in terms.shared else None
            for rules in each if key in terms.each else ():
                rules[key] = (*rules.get(key, ()), Rule((default,)))
    weights = [_weight(rules) for rules in each]
    mean = all(point is True for rule in common.get("normalize", ()) for point in rule.points)
    whole = None not in weights and abs(math.fsum(weight or 0 for weight in weights) - 1) < 1e-9
    if terms.base == "member" and not mean and not whole:
        raise UsageError(f"in mergekit's {method} without normalize the base is scaled by the sum of the weights",
                         hint="task_arithmetic is the same sum of deltas")
    _balance(method, terms, common, each, weights)
    return method, common, each


def _balance(method: str, terms: Contract, common: Rules, each: list[Rules], weights: list[float | None]) -> None:
    """Between two inputs t and the weights say the same: t = w_2 / (w_1 + w_2). Write what mergekit's method takes."""
    t = tuple(rule for rule in common.pop("t", ()) if rule.points != (None,))
    if t and "t" not in terms.shared:
        each[0]["weight"] = tuple(replace(rule, points=tuple(1 - point for point in rule.points)) for rule in t)
        each[1]["weight"] = t
    elif t:
        common["t"] = t
    elif "t" in terms.shared:
        if any(weight is None for weight in weights):
            raise UsageError(f"mergekit's {method} takes t, and these weights vary over the model", hint="give t instead")
        common["t"] = (Rule((weights[1] / sum(weights),)),)  # type: ignore[operator, arg-type]
    if "weight" not in terms.each:
        if "t" not in terms.shared and any(weight != 1 for weight in weights):
            raise UsageError(f"mergekit's {method} has no weights", hint="leave them out")
        for rules in each:
            rules.pop("weight", None)


def _weight(rules: Rules) -> float | None:
    """The weight that an input has in every tensor, None where it varies."""
    first = next(iter(rules.get("weight", ())), Rule((1.0,)))
    return first.points[0] if len(first.points) == 1 and first.filter is None and first.layers is None else None


# Values and names


def _section(known: Mapping[str, Any], rules: Rules, depth: Depth) -> dict[str, Any]:
    """A ``parameters`` section: what was said, and the weight that mergekit has no default for."""
    found: dict[str, Any] = {}
    for key, default in known.items():
        setting = rules.get(key, ()) or ((Rule((1.0,)),) if key == "weight" and default == REQUIRED else ())
        conditions = [
            {"filter": text, "value": points} if text else {"value": points}
            for rule in setting
            for text in _filters(rule, depth)
            if (points := _points(rule, default)) is not None
        ]
        plain = next((i for i, one in enumerate(conditions) if "filter" not in one), len(conditions))
        if conditions:
            found[key] = conditions[0]["value"] if plain == 0 else conditions[: plain + 1]
    return found


def _points(rule: Rule, default: Any) -> Any:
    points = [default if point is None else point for point in rule.points]
    return points[0] if len(points) == 1 else points


def _filters(rule: Rule, depth: Depth) -> list[str | None]:
    """Substrings that together select what ``filter`` and ``layers`` select."""
    if rule.layers is None:
        return [rule.filter]
    chosen = range(rule.layers[0], rule.layers[1] + 1)
    if rule.filter is None:
        return [f"{prefix}{layer}." for layer in chosen for prefix, count in depth.counts.items() if layer < count]
    return [name for name in depth.names if rule.applies(name, depth.place(name)[0])]


def reference(path: Path, name: str) -> str:
    """How mergekit can find a directory: the hub id and revision of a snapshot, else the path."""
    found = name if path.parent.name == "snapshots" else str(path)
    if "+" in found or ("@" in found and found is not name) or found.count("@") > 1:
        raise MismatchError(f"mergekit cannot read the path {found}: + and @ have a meaning there", hint="rename it")
    return found


def dtype_of(base: Checkpoint) -> str:
    """The one float type of a base; MismatchError where it has several, as mergekit writes all tensors in one."""
    found = sorted({str(FLOATS[entry.dtype]).removeprefix("torch.") for entry in base.entries.values() if entry.is_float})
    if len(found) != 1:
        raise MismatchError(f"the base has tensors in {' and '.join(found)}, and mergekit writes one type", hint="--dtype NAME")
    return found[0]


class _Dumper(yaml.SafeDumper):
    """Gradients and conditions on one line."""


def _flow(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=not any(isinstance(one, dict) for one in value))


_Dumper.add_representer(list, _flow)
