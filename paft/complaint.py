"""What pydantic says of a recipe, in one line for its user: the place that is wrong, and what would be right."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from paft.errors import UsageError, did_you_mean
from paft.yamlfile import Document


def explain(kind: type[BaseModel], error: ValidationError, document: Document) -> UsageError:
    """The first complaint in one line, a misspelt key before its absence; all missing keys at once."""
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    # Of the members of a union each complains; the one that got deepest is the one that was meant.
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same, key=lambda each: (each["type"] == "extra_forbidden", len(each["loc"])))
    loc, _ = _walk(kind, first["loc"])
    path, where = ".".join(map(str, loc)), document.where(loc)
    if first["type"] == "extra_forbidden":
        return UsageError(f"{where}: unknown key {path!r}", hint=did_you_mean(str(loc[-1]), _keys_at(kind, first["loc"][:-1])))
    if first["type"] == "missing":
        missing = [".".join(map(str, _walk(kind, e["loc"])[0])) for e in errors if e["type"] == "missing"]
        verb = "is" if len(missing) == 1 else "are"
        return UsageError(f"{where}: {', '.join(missing)} {verb} missing", hint=" ".join(f"--set {name}=..." for name in missing))
    sections = ("model_type", "dict_type", "model_attributes_type")
    said = "should be a section of keys and values" if first["type"] in sections else first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "value_error":  # one of our own, which says what it got
        return UsageError(f"{where}: {path}: {said.removeprefix('value error, ')}"[:300])
    return UsageError(f"{where}: {path or 'recipe'}: {said}, got {first.get('input')!r}"[:300])


def _walk(kind: Any, loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """(``loc`` without the names that pydantic adds for the members of a union, the type it leads to or None)."""
    clean: list[int | str] = []
    for part in loc:
        members = [one for one in get_args(kind) if one is not types.NoneType] if _is_union(kind) else []
        if len(members) > 1:
            kind = next((one for one in members if getattr(one, "__name__", "") == part), members[-1])
            continue
        kind = members[0] if members else kind
        clean.append(part)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        else:
            kind = get_args(kind)[-1] if get_args(kind) else None
    return tuple(clean), kind


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _keys_at(kind: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the node at ``loc`` would accept."""
    found = _walk(kind, loc)[1]
    found = next((one for one in get_args(found) if one is not types.NoneType), found) if _is_union(found) else found
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []
