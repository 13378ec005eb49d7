"""What of this machine would make a command fail, found before one does: versions, torch, GPU, memory, disk, hub, extras.

The range of a package runs from the floor in paft's own metadata to the version in `constraints.txt` that the tests ran with.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from paft.store.cache import home

ROOM = 5e9  # bytes: a 1.1B base in bfloat16 and its merge
PATIENCE = 5.0  # seconds that the hub has to answer
ANSWERS = (*range(200, 400), 401, 404, 405, 429)  # any other status is a proxy's, or trouble
LOADED = ("torch", "transformers", "peft", "trl", "datasets", "mergekit")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``do`` is the remedy, where there is something to remedy."""

    name: str
    state: Literal["ok", "note", "fail"]
    found: str
    do: str | None = None


def examine() -> list[Finding]:
    """Everything, in the order of the list above; it takes as long as importing torch and TRL, and at most `PATIENCE` more."""
    return [python(), *packages(), *imports(), torch_build(), memory(), disk("HF_HOME", cache()),
            disk("PAFT_CACHE", home(), held(home())), disk("temporary", scratch()), hub(), quantisation()]


def cache() -> Path:
    """Where models from the hub are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


def held(path: Path) -> str:
    """How much was fetched from URLs, for somebody who wants the room; a file of two names counts once."""
    found = {(stat.st_dev, stat.st_ino): stat.st_size for file in path.rglob("*") if file.is_file() and (stat := file.stat())}
    total = sum(found.values())
    return f", {total / 1e9:.1f} GB held: may be deleted when nothing runs" if total >= 1e8 else ""


def scratch() -> Path:
    """Where a training keeps what it needs for the moment."""
    return Path(tempfile.gettempdir())


def python() -> Finding:
    """Is this Python one that paft is for?"""
    wanted, found = importlib.metadata.metadata("paft")["Requires-Python"] or ">=3.11", sys.version.split()[0]
    fits = Requirement(f"python{wanted}").specifier.contains(found, prereleases=True)
    return Finding("python", "ok" if fits else "fail", found, None if fits else f"install Python {wanted}")


def packages() -> list[Finding]:
    """A line for each package that is absent, too old, or newer than what was tested; one for all the others."""
    known, fine, odd = tested(), 0, []
    for text in importlib.metadata.requires("paft") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        finding = judge(need, installed(need.name), known.get(normal(need.name)))
        fine += finding.state == "ok"
        odd += [finding] if finding.state != "ok" else []
    return [Finding("packages", "ok", f"{fine} in the tested range"), *odd]


def judge(need: Requirement, found: str | None, known: str | None) -> Finding:
    """A package's version against its floor and against the version that was tested, to the minor one."""
    want = f"pip install '{need.name}{need.specifier}'"
    if found is None:
        return Finding(need.name, "fail", "not installed", want)
    if not need.specifier.contains(found, prereleases=True):
        return Finding(need.name, "fail", f"{found}, needs {need.specifier}", want)
    if known and Version(found).release[:2] > Version(known).release[:2]:
        return Finding(need.name, "note", f"{found} is newer than the tested {known}",
                       f"if something breaks: pip install '{need.name}=={known}'")
    return Finding(need.name, "ok", found)


def installed(name: str) -> str | None:
    try:
        found = importlib.metadata.version(name)
        Version(found)
        return found
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def tested() -> dict[str, str]:
    """Package -> the version of `constraints.txt`, which travels in the wheel."""
    here = Path(__file__).parent
    for file in (here / "_constraints.txt", here.parent / "constraints.txt"):
        if file.is_file():
            pairs = (line.split("==") for line in file.read_text(encoding="utf-8").splitlines() if "==" in line)
            return {normal(name): version.strip() for name, version in pairs}
    return {}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def imports() -> list[Finding]:
    """The libraries that load native code or each other; a line for each that cannot be loaded."""
    odd = []
    for name in LOADED:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken installation raises
            said = (str(error).splitlines() or [type(error).__name__])[0]
            odd.append(Finding(name, "fail", f"cannot be imported: {said[:120]}", f"pip install --force-reinstall {name}"))
    return odd or [Finding("imports", "ok", ", ".join(LOADED))]


def torch_build() -> Finding:
    """The build of torch and the GPUs that it sees; a GPU that it cannot use is worth a note."""
    try:
        import torch
    except ImportError:
        return Finding("device", "fail", "there is no torch", "pip install torch")
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        cards = ", ".join(f"{card.name} ({card.total_memory / 1e9:.0f} GB)" for card in seen)
        return Finding("device", "ok", f"torch {torch.__version__}: {cards}")
    if not any(Path("/dev").glob("nvidia[0-9]*")) and shutil.which("nvidia-smi") is None:
        return Finding("device", "ok", f"torch {torch.__version__} on the CPU, no GPU here")
    if torch.version.cuda is None:
        return Finding("device", "note", f"there is a GPU, and torch {torch.__version__} is built without CUDA",
                       "install torch from the CUDA index that pytorch.org names")
    return Finding("device", "note", f"there is a GPU, and torch {torch.__version__} cannot use it",
                   "compare `nvidia-smi` and CUDA_VISIBLE_DEVICES with torch's CUDA " + torch.version.cuda)


def memory() -> Finding:
    """The memory that this process may use."""
    from paft.preflight import free_memory

    free = free_memory()
    if free is None:
        return Finding("memory", "note", "cannot be told on this system")
    return Finding("memory", "ok" if free > 2e9 else "note", f"{free / 1e9:.1f} GB free",
                   None if free > 2e9 else "even the demo needs about 1 GB: end other programs")


def disk(name: str, path: Path, more: str = "") -> Finding:
    """Can it be written to, and is there room for a model?"""
    place = next(each for each in (path, *path.parents) if each.exists())
    free = shutil.disk_usage(place).free
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        said = f"{path}: {(error.strerror or str(error)).lower()}"
        return Finding(name, "fail", said, "point it at a directory you may write to (TMPDIR, HF_HOME, PAFT_CACHE)")
    return Finding(name, "ok" if free > ROOM else "note", f"{path}: {free / 1e9:.1f} GB free{more}",
                   None if free > ROOM else f"less than {ROOM / 1e9:.0f} GB: point it at a larger disk")


def hub(fetch: Callable[[str], int] | None = None) -> Finding:
    """Does the hub answer? Offline mode is respected: then nothing is asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", "offline, by HF_HUB_OFFLINE: only what is on the disk")
    who = "with a token" if get_token() else "without a token"
    said = within(PATIENCE, lambda: (fetch or _status)(constants.ENDPOINT))
    if said in ANSWERS:
        return Finding("hub", "ok", f"{constants.ENDPOINT} answers, {who}")
    said = f"HTTP {said}" if isinstance(said, int) else said
    return Finding("hub", "fail", f"{constants.ENDPOINT}: {said}",
                   "HF_HUB_OFFLINE=1 works with what is on the disk; else look at network and proxy")


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns, or in words why it did not; a thread of its own, since looking up a name knows no time limit."""
    said: list[Any] = [f"no answer within {seconds:.0f} s"]

    def work() -> None:
        try:
            said[0] = ask()
        except Exception as error:  # whatever the network's layers raise
            said[0] = str(getattr(error, "reason", error)) or type(error).__name__

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0]


def _status(url: str) -> int:
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # the user's own HF_ENDPOINT
            return int(answer.status)
    except urllib.error.HTTPError as error:  # it answered
        return error.code


def quantisation() -> Finding:
    """The one extra that a recipe can ask for."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return Finding("extras", "ok", "quant")
    return Finding("extras", "ok", "quant is not installed (for `quantize: 4bit`): pip install 'paft[quant]'")


def report(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON has them."""
    return {"ok": all(each.state != "fail" for each in findings), "offline": os.environ.get("HF_HUB_OFFLINE"),
            "findings": [asdict(each) for each in findings]}
