"""What a merge starts from: names become an opened base and one `Delta` per adapter or fine-tuned model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paft import hub
from paft.adapter import CONFIG, PATTERNS, Adapter, label, read_adapter
from paft.checkpoint import Checkpoint
from paft.delta import TILE_ELEMENTS, Delta, FullDelta, LoraDelta, Tiled
from paft.errors import MismatchError, NotFoundError, UsageError
from paft.merge.deltafile import PATTERNS as DELTA_PATTERNS
from paft.merge.deltafile import DeltaFile, base_of, is_delta
from paft.provenance import content_hash, recorded_base, tensor_files
from paft.store import Store, check_unchanged, is_url, places, source_of, weight_files


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a merge; ``adapters`` are those of them that are LoRA adapters.

    ``base_hash`` is the base's content hash if it had to be computed to compare it with what the adapters record; else
    ``recorded`` is what they record, which whoever reads all of the base compares by `check_hash`.
    """

    base: Checkpoint
    base_name: str
    deltas: list[Delta]
    names: list[str]
    paths: list[Path]
    adapters: list[Adapter]
    reference: str  # the base as it was named: a path, or a hub id
    base_hash: str | None = None
    recorded: Sequence[tuple[str, str]] = ()  # (adapter, content hash)

    def touched(self) -> list[str]:
        """The base's tensors that some delta changes, in the base's order."""
        changed = {name for delta in self.deltas for name in delta.names}
        return [name for name in self.base.entries if name in changed]

    def described(self) -> list[dict[str, str]]:
        """Each input by name and content; of an adapter also the hash of its config, whose scale is half of the delta."""
        found = []
        for name, delta, path in zip(self.names, self.deltas, self.paths, strict=True):
            found.append({"name": name, "content_sha256": delta.content_hash})
            if (path / CONFIG).is_file():
                found[-1]["config_sha256"] = hashlib.sha256((path / CONFIG).read_bytes()).hexdigest()
        return found

    def check_apart(self, out: Path | Store) -> None:
        """MismatchError where the output would replace one of the inputs."""
        if any(_holds(out, path) for path in (self.base.path, *self.paths)):
            raise MismatchError(f"{out} holds an input of this command", hint="choose another -o DIR")

    def check_hash(self, found: str) -> None:
        """MismatchError where a base of this content hash is not the one that an adapter records."""
        _check_hash(self.recorded, self.base.path, found)

    def check_unchanged(self) -> None:
        """MismatchError where weights behind a URL are no longer what was read."""
        check_unchanged([*self.base.files, *(file for path in self.paths for file in tensor_files(path))])


def _holds(out: Path | Store, path: Path) -> bool:
    """Does ``path``, or the URL that it was fetched from, lie in ``out``?"""
    url = source_of(path) or path.resolve().as_uri()
    if isinstance(out, Store):
        return f"{url}/".startswith(f"{out.bucket.url}/")
    return f"{url}/".startswith(f"{out.resolve().as_uri()}/") or out in places(url)


def open_inputs(names: Sequence[str], base: str | None, *, allow_base_mismatch: bool = False, weights: bool = False,
                hash_later: bool = False) -> Inputs:
    """Open the base and every input; ``base`` None means the one that all the adapters name.

    What lies behind a URL is read there by ranges, or with ``weights`` fetched whole. With ``hash_later`` the content hash of
    such a base is left to the caller, who reads it all (`Inputs.check_hash`).

    Raises UsageError without inputs or when full models come without a base, NotFoundError for what does not exist,
    MismatchError when adapters name different bases, do not fit the base, or record in ``paft.json`` that they were
    trained on a base of other content (unless ``allow_base_mismatch``: the same model in another type), and when an
    input comes twice: its weight says how often it counts. (mergekit adds it twice, silently.)
    """
    if not names:
        raise UsageError("nothing to merge", hint="name at least one adapter")
    opened = [_open(name, weights=weights) for name in names]
    adapters = [each for each in opened if isinstance(each, Adapter)]
    reference = base or _delta_base(opened) or _common_base(adapters, len(opened))
    directory = _find_base(reference, given=base is not None, weights=weights)
    if (directory / CONFIG).is_file():
        raise MismatchError(f"the base {directory.name} is an adapter", hint="name the model that it was trained on")
    checkpoint = Checkpoint.open(directory)
    recorded = [] if allow_base_mismatch else _recorded(adapters)
    base_hash = content_hash(directory) if recorded and not (hash_later and weight_files(directory)) else None
    if base_hash:
        _check_hash(recorded, directory, base_hash)
    deltas = [_delta(each, checkpoint) for each in opened]
    if all(isinstance(delta, NoDelta) for delta in deltas):
        raise MismatchError("there is nothing to merge: every input is the base itself", hint="name an adapter")
    labels = [each.name if isinstance(each, Adapter) else label(name, each) for name, each in zip(names, opened, strict=True)]
    paths = [each.path if isinstance(each, Adapter) else each for each in opened]
    _check_distinct(labels, deltas)
    named = label(reference, directory)
    named_as = reference if os.path.exists(os.path.expanduser(reference)) or is_url(reference) else named
    return Inputs(checkpoint, named, deltas, labels, paths, adapters, named_as, base_hash, recorded)


@dataclass(frozen=True)
class NoDelta:
    """The base as an input of its own merge: it changes no tensor, but its weight counts (mergekit's ``linear``)."""

    path: Path
    names: list[str] = field(default_factory=list)

    @property
    def content_hash(self) -> str:
        return content_hash(self.path)

    def tensor(self, name: str, elements: int = TILE_ELEMENTS) -> Tiled:
        raise KeyError(name)


def _delta(opened: Adapter | Path, base: Checkpoint) -> Delta:
    if isinstance(opened, Adapter):
        return LoraDelta(opened, base)
    if is_delta(opened):
        return DeltaFile(opened, base)
    if opened.resolve() == base.path.resolve():
        return NoDelta(base.path)
    return FullDelta(Checkpoint.open(opened), base, content_hash(opened))


def _recorded(adapters: Sequence[Adapter]) -> list[tuple[str, str]]:
    """The content hash of its base that each adapter records."""
    return [(adapter.name, wanted) for adapter in adapters if (wanted := recorded_base(adapter.path))]


def _check_hash(recorded: Sequence[tuple[str, str]], base: Path, found: str) -> None:
    for name, wanted in recorded:
        if wanted != found:
            raise MismatchError(
                f"{name} was trained on a base of content {wanted[:12]}, {base.name} has {found[:12]}",
                hint="pass the base it was trained on, or --allow-base-mismatch if only the type differs",
            )


def _check_distinct(names: Sequence[str], deltas: Sequence[Delta]) -> None:
    """Refuse two inputs with the same tensors; adapters also differ by their scales."""
    seen: dict[object, str] = {}
    for name, delta in zip(names, deltas, strict=True):
        scales = [f.scale for f in delta.adapter.factors.values()] if isinstance(delta, LoraDelta) else []
        key = "the base" if isinstance(delta, NoDelta) else (delta.content_hash, *scales)  # the base is not hashed for this
        if key in seen:
            same = f"{name} is given twice" if seen[key] == name else f"{name} and {seen[key]} hold the same tensors"
            raise MismatchError(same, hint="give it once, with the sum of the weights")
        seen[key] = name


def _open(name: str, *, weights: bool) -> Adapter | Path:
    directory = hub.resolve(name, kind="adapter", patterns=[*PATTERNS, *DELTA_PATTERNS, "config.json"], weights=weights)
    if is_delta(directory):
        return directory
    if (directory / CONFIG).is_file():
        return read_adapter(name)
    if not (directory / "config.json").is_file():
        raise NotFoundError(f"{name} is neither an adapter nor a model: no {CONFIG}, no config.json")
    return hub.resolve(name, kind="model", patterns=hub.MODEL_FILES, weights=weights)


def _delta_base(opened: Sequence[Adapter | Path]) -> str | None:
    """The base of the first delta file, where no adapter names one; a delta file checks its base tensor by tensor."""
    if any(isinstance(each, Adapter) and each.base_model for each in opened):
        return None
    return next((base_of(each) for each in opened if isinstance(each, Path) and is_delta(each)), None)


def _common_base(adapters: Sequence[Adapter], inputs: int) -> str:
    if not adapters:
        raise UsageError("a fine-tuned model needs its base to be a delta", hint="pass --base")
    named = {_base_reference(adapter): adapter for adapter in adapters if adapter.base_model}
    if not named:
        raise MismatchError("the adapters do not name their base", hint="pass --base")
    if len(named) > 1:
        listed = ", ".join(f"{adapter.name} on {reference}" for reference, adapter in named.items())
        raise MismatchError(f"the adapters name different bases: {listed}", hint="pass --base if one base fits them all")
    return next(iter(named))


def _base_reference(adapter: Adapter) -> str:
    name = adapter.base_model or ""
    path = os.path.expanduser(name)  # unlike Path's, leaves the home of nobody alone, and a name that is too long
    if os.path.isdir(path):
        return os.path.realpath(path)
    return f"{name}@{adapter.base_revision}" if adapter.base_revision and "@" not in name else name


def _find_base(reference: str, *, given: bool, weights: bool) -> Path:
    try:
        return hub.resolve(reference, kind="base", patterns=hub.MODEL_FILES, weights=weights)
    except NotFoundError as error:
        if given:
            raise
        raise NotFoundError(
            f"the base that the adapters name, {reference}, cannot be found", hint="pass --base with its path or hub id"
        ) from error
