"""The recipes that ship with paft, by name, and what kind a recipe file is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from paft.errors import NotFoundError, UsageError, did_you_mean
from paft.recipe import KINDS
from paft.store import fetched, is_url
from paft.yamlfile import read_yaml


def catalog() -> dict[str, Path]:
    """Every shipped recipe by name: ``sft-l1``, ``dpo``, ``ties``, ``demo``, ..."""
    package = Path(__file__).parent
    roots = [package / "_recipes", package.parent]
    found: dict[str, Path] = {}
    for root in roots:
        for folder in ("adapters", "merges"):
            for file in sorted((root / folder).glob("*.yaml")):
                found.setdefault(file.stem, file)
    return found


def find(name: str) -> Path:
    """A recipe by path, by URL or by shipped name; NotFoundError with a did-you-mean otherwise."""
    path = Path(name)
    if os.path.isfile(path):
        return path
    if is_url(name):
        return fetched(name)
    known = catalog()
    if name in known:
        return known[name]
    raise NotFoundError(f"no recipe {name!r}: neither a file nor a shipped recipe", hint=did_you_mean(name, known))


def kind_of(file: Path) -> str:
    """The ``kind`` a recipe file declares (mergekit's files are merges); UsageError when it is none that paft knows."""
    data = read_yaml(file).data
    declared = "merge" if is_mergekit(data) else str(data.get("kind"))
    if declared not in KINDS:
        raise UsageError(f"{file} declares no known kind ({declared!r})", hint="kind: one of " + ", ".join(KINDS))
    return declared


def is_mergekit(data: dict[str, Any]) -> bool:
    """Is this mergekit's YAML? One of these keys is in each of its files, even one with a misspelt key, and none in ours."""
    return "kind" not in data and not data.keys().isdisjoint(("merge_method", "models", "slices", "modules"))
