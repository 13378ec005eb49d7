"""A tree of artefacts against their `paft.json`: what differs in each, and whether they were made from one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paft.errors import MismatchError, NotFoundError
from paft.provenance import MANIFEST, content_hash, read_manifest, verify

Artefacts = dict[Path, dict[str, Any]]


def verify_tree(root: Path, against: Sequence[Path] = ()) -> dict[str, Any]:
    """Check ``root`` and every artefact below it, such as a run's stages; ``against`` are bases and adapters it was made from.

    Returns ``{"directory", "ok", "artefacts", "differences"}``; a difference is one line that begins with the place. Raises
    NotFoundError where nothing below ``root`` has a ``paft.json``.
    """
    if not root.is_dir():
        raise NotFoundError(f"no directory {root}")
    found, differences = _artefacts(root)
    if not found and not differences:
        raise NotFoundError(f"{root} has no {MANIFEST}", hint="only what paft made can be verified")
    for path in found:
        where = "" if path == root else f"{path.relative_to(root)}: "
        try:
            differences += [where + line for line in verify(path)]
        except (MismatchError, NotFoundError) as error:
            differences.append(where + error.message)
    differences += _broken_links(root, found)
    for path in against:
        differences += _unrelated(path, found.get(root, {}))
    return {"directory": str(root), "ok": not differences, "artefacts": len(found), "differences": differences}


def _artefacts(root: Path) -> tuple[Artefacts, list[str]]:
    """Every directory with a manifest by path, and a line for each manifest that cannot be read."""
    found: Artefacts = {}
    broken = []
    for file in sorted(root.rglob(MANIFEST)):
        inner = file.parent.relative_to(root).parts
        if any(part.startswith(".") or part.endswith(".partial") for part in inner):  # another process is at it, or was
            continue
        try:
            found[file.parent] = read_manifest(file.parent) or {}
        except MismatchError as error:
            broken.append(error.message)
    return found, broken


def _sources(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, content hash) of the base, the adapters and models that an artefact says it was made from."""
    base, inputs = manifest.get("base"), manifest.get("inputs")
    base = base if isinstance(base, dict) else {}
    for each in (base, base.get("on"), *(inputs if isinstance(inputs, list) else ())):
        if isinstance(each, dict) and isinstance(each.get("content_sha256"), str):
            yield str(each.get("name")), each["content_sha256"]


def _broken_links(root: Path, found: Artefacts) -> list[str]:
    """Stages that a run's recipe names and that are absent, bases that differ, and merges of what stands there no longer."""
    top = found.get(root, {})
    recipe = top.get("recipe") if top.get("command") == "run" else None
    named = [recipe.get(key) for key in ("train", "merge")] if isinstance(recipe, dict) else []
    stages = [name for each in named if isinstance(each, dict) for name in each]
    known = {path.name: manifest.get("content_sha256") for path, manifest in found.items() if path != root}
    lines = [f"{name} is missing: the run's recipe names it" for name in stages if name not in known]
    base = next((wanted for _, wanted in _sources(top)), None) if recipe and isinstance(top.get("base"), dict) else None
    for path, manifest in found.items():
        where = path.relative_to(root)
        if path == root:
            continue
        for number, (name, wanted) in enumerate(_sources(manifest)):
            stands = known.get(Path(name).name)
            if number == 0 and isinstance(manifest.get("base"), dict):
                if base and wanted != base and stands != wanted:
                    lines.append(f"{where}: made on a base of content {wanted[:12]}, the run's is {base[:12]}")
            elif stands and stands != wanted:
                lines.append(f"{where}: made from {name} of content {wanted[:12]}, which is now {str(stands)[:12]}")
    return lines


def _unrelated(path: Path, manifest: dict[str, Any]) -> list[str]:
    if not path.is_dir():
        raise NotFoundError(f"no directory {path}")
    content, sources = content_hash(path), list(_sources(manifest))
    if content in (wanted for _, wanted in sources):
        return []
    named = ", ".join(f"{name} {wanted[:12]}" for name, wanted in sources) or "nothing it names"
    return [f"{path} has content {content[:12]}: it was made from {named}"]
