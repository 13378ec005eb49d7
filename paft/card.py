"""Model cards: a README with the YAML header that the hub reads, the recipe and the numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from paft.errors import one_line

Row = Mapping[str, Any]


def model_card(
    title: str,
    *,
    base: str | None,
    recipe: Mapping[str, Any],
    metrics: Sequence[Row] = (),
    tags: Sequence[str] = ("paft", "merge"),
    text: str = "",
    relation: str = "merge",
) -> str:
    """The card of a model. ``base`` is a hub id, or None; ``relation`` is the hub's word; ``metrics`` are the rows of a table."""
    header = {"base_model": _repo(base), "base_model_relation": relation if _repo(base) else None}
    return _card(title, header | {"library_name": "transformers", "tags": list(tags)}, recipe, metrics, text)


def adapter_card(
    title: str,
    *,
    base: str | None,
    recipe: Mapping[str, Any],
    metrics: Sequence[Row] = (),
    tags: Sequence[str] = ("paft", "lora"),
    text: str = "",
) -> str:
    """The card of a LoRA adapter; arguments as for `model_card`."""
    header = {"base_model": _repo(base), "base_model_relation": "adapter" if _repo(base) else None}
    return _card(title, header | {"library_name": "peft", "tags": list(tags)}, recipe, metrics, text)


def delta_card(
    title: str,
    *,
    base: str | None,
    recipe: Mapping[str, Any],
    metrics: Sequence[Row] = (),
    tags: Sequence[str] = ("paft", "delta"),
    text: str = "",
) -> str:
    """The card of a delta file; arguments as for `model_card`."""
    return _card(title, {"base_model": _repo(base), "tags": list(tags)}, recipe, metrics, text)


def _repo(base: str | None) -> str | None:
    """``org/name@revision`` -> ``org/name``: the hub's header knows no revision. Other names are not for the hub."""
    repo = (base or "").partition("@")[0]
    return repo if repo.count("/") == 1 and not repo.startswith((".", "/", "~")) else None


def _card(title: str, header: Mapping[str, Any], recipe: Mapping[str, Any], metrics: Sequence[Row], text: str) -> str:
    parts = ["---\n" + _yaml({key: value for key, value in header.items() if value is not None}) + "---",
             f"# {escape(one_line(title), quote=False)}"]
    if text:
        parts.append(text)
    parts.append("Made with `paft` from this recipe (hashes and versions are in `paft.json`):")
    body = _yaml(recipe)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))  # a name may hold one
    parts.append(f"{fence}yaml\n{body}{fence}")
    if metrics:
        parts.append(_table(metrics))
    return "\n\n".join(parts) + "\n"


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, default_flow_style=False)


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(one_line(str(value)), quote=False).replace("|", "\\|")
