"""Names into directories: a path that exists wins, then the demo bases, then a URL, then a hub id `org/name[@revision]`."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from paft.errors import MismatchError, NotFoundError, PaftError, UsageError, did_you_mean
from paft.jsonfile import read_json
from paft.store import fetched, is_url

DEMO = Path(__file__).parent / "demo"
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*"]
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_LINKS = 20  # that lead on to one another
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def demo_bases() -> dict[str, Path]:
    """``{"demo:a": path, ...}``: the bases that ship with paft. ``demo`` alone is the first of them."""
    return {f"demo:{path.name.removeprefix('base_')}": path for path in sorted(DEMO.glob("base_*"))}


def resolve(name: str, *, kind: str = "model", patterns: list[str] | None = None, weights: bool = True) -> Path:
    """The local directory of a model or adapter, fetched from the hub if need be.

    ``name`` is a path, ``demo`` / ``demo:a`` / ``demo:b``, ``s3://...`` (`paft.store`), or ``org/name[@revision]``. Offline mode
    (``HF_HUB_OFFLINE=1``) is honoured. Without ``weights`` those behind a URL stay there, to be read by ranges. Raises
    NotFoundError when there is no such thing, UsageError for an unknown demo base.
    """
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves an unknown ~user alone
    if os.path.isdir(path):  # unlike Path's, takes a name that is too long for one that is not there
        return contained(path)
    if os.path.exists(path):
        raise MismatchError(f"{name} is a file, not a directory with the {kind}", hint="name the directory that holds it")
    if name.split(":")[0] == "demo":
        bases = demo_bases()
        if name == "demo" and bases:
            return next(iter(bases.values()))
        if name not in bases:
            raise UsageError(f"there is no demo base {name!r}", hint=did_you_mean(name, bases))
        return bases[name]
    if is_url(name):
        return fetched(name, patterns or ["*"], weights=weights)
    return _download(name, kind, patterns)


def contained(directory: Path) -> Path:
    """``directory``; MismatchError where a link in it would bring a file of this machine into what is made, and so to the hub.

    In a snapshot of the hub no link may lead out of its repository's part of the cache. A directory of the user's own, which may
    be a stranger's (an archive, a clone), may link weights from anywhere: they are read as tensors, and never copied unread. Any
    other file that a link leads to outside must have the same name there, in the directory of a model or an adapter.
    """
    real = directory.resolve()
    if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
        for path in real.rglob("*"):
            if path.is_symlink() and not path.resolve().is_relative_to(real.parents[1]):
                raise MismatchError(f"{directory}: {path.name} is a link that leads out of the hub's cache",
                                    hint="delete the snapshot, and download it again")
        return directory
    for path in (*real.iterdir(), *real.glob("additional_chat_templates/*")):
        if path.name.startswith(".") or path.suffix in WEIGHTS:
            continue
        if not path.resolve().is_relative_to(real) and not _leads_to_its_like(path, real):
            raise MismatchError(f"{directory}: {path.name} is a link to {os.path.realpath(path)}, outside",
                                hint="put the file itself there, if you trust it (cp -L)")
    return directory


def _leads_to_its_like(path: Path, top: Path) -> bool:
    """Does every link on the way lead to a file of the same name beside a model's or an adapter's config, or to a hub's blob?"""
    for _ in range(_LINKS):
        if not path.is_symlink():
            return path.is_file()
        place = Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))
        here, there = path.parent.resolve(), place.parent.resolve()
        blob = there.name == "blobs" and here.is_relative_to(there.parent / "snapshots") and not here.is_relative_to(top)
        if not (blob or (place.name == path.name and _is_artefact(there))):
            return False
        path = there / place.name
    return False


def _is_artefact(directory: Path) -> bool:
    """Does a config say that here is a model, or an adapter?"""
    for name, key in (("config.json", "model_type"), ("adapter_config.json", "peft_type")):
        with suppress(PaftError, OSError):
            if key in read_json(directory / name):
                return True
    return False


def split_revision(name: str) -> tuple[str, str | None]:
    """``org/name@rev`` -> ``("org/name", "rev")``; a path that exists is left alone."""
    if os.path.exists(name) or "@" not in name:
        return name, None
    repo, _, revision = name.rpartition("@")
    return repo, revision


def _download(name: str, kind: str, patterns: list[str] | None) -> Path:
    repo, revision = split_revision(name)
    if not _HUB_ID.fullmatch(repo) or ".." in repo or "--" in repo:
        raise NotFoundError(f"no {kind} at {name}", hint="check the path; a hub id looks like org/name or org/name@revision")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Patterns match nested files too, so that checkpoints beside the model would come along.
    nested = ["*/*"] if patterns and not any("/" in pattern for pattern in patterns) else None
    try:
        return contained(Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=nested)))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise NotFoundError(f"no {kind} {name}: not a directory here, not in the hub cache, and {why}",
                            hint="check the path; a hub id looks like org/name or org/name@revision") from error
    except GatedRepoError as error:
        raise NotFoundError(f"{repo} is gated",
                            hint=f"accept its terms at huggingface.co/{repo}, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(f"no {kind} {name}: neither a directory here nor a repository that you may read on the hub",
                            hint="check the spelling; for a private one, `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{repo} has no revision {revision!r}", hint=f"see huggingface.co/{repo}/commits/main") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFoundError(f"no {kind} {name}: {reason}", hint="check the name, the revision and `hf auth login`") from error
