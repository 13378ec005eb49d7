"""Where rows come from: a file, a directory, the demo, or the hub. Rows are read as they stand, one dict each.

    rows.jsonl  rows.json  rows.parquet  rows.csv  rows.tsv  rows.txt      (text kinds also .gz .bz2 .xz, .zst with `zstandard`)
    DIRECTORY                                all data files in it, in order of name; they must be of one kind and one split
    demo:sft | demo:pref | demo:text [:train|validation|test]
    s3://BUCKET/DIR/rows.jsonl               a file or directory behind a URL (`paft.store`)
    ORG/NAME[@REVISION][#SUBSET][:SPLIT]     the hub; SPLIT as `datasets` writes it: train, test, train[:1000], train[10%:20%]
    PATH[#SUBSET][:SPLIT]                    a downloaded hub repository, `save_to_disk` output, or a slice of a file

A path that exists wins over a hub id. Text files are read with the standard library and Parquet with pyarrow, not through
`datasets`: its readers make one type of a column, so that ``"42"`` in a CSV becomes a number, ``"None"`` nothing, and a key that
one message has appears in all. Raises NotFoundError (no such data) or UsageError (unreadable).
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from paft.errors import NotFoundError, PaftError, ResourceError, UsageError, did_you_mean
from paft.hub import split_revision
from paft.store import fetched, is_url

Row = dict[str, Any]
Split = Literal["train", "validation", "test"]
_LONGEST = 1 << 26  # characters of a line, or of a cell
_UNPACKED, _RATIO = 1 << 22, 200  # of a packed file: text packs to a fifth, a log to a hundredth
PACKED = {".gz", ".bz2", ".xz", ".zst"}
_SPLIT = re.compile(r"(?<![a-z])(train|test|valid|val|dev|eval)(ing|idation|uation)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """A source's parts: ``name`` is a path or a hub id without revision."""

    name: str
    revision: str | None = None
    subset: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, source: str) -> Place:
        """``org/name@rev#subset:split``; no part of a path that exists is taken for one of these."""
        if os.path.exists(_expand(source)):
            return cls(source)
        marks = [i for i, character in enumerate(source) if character in "#:"]
        end = next((i for i in reversed(marks) if os.path.exists(_expand(source[:i]))), min(marks, default=len(source)))
        named, _, split = source[end:].partition(":")
        name, revision = split_revision(source[:end])
        return cls(name, revision, named.removeprefix("#") or None, split or None)

    @property
    def path(self) -> Path:
        return _expand(self.name)


def read(source: str, split: Split | None = None, *, streaming: bool = False) -> Iterable[Row]:
    """The rows of ``source``; ``split`` is used where the source names none. Nothing is held in memory when ``streaming``."""
    if source.split(":")[0] == "demo":
        return _demo(source, split)
    place = Place.parse(str(fetched(source)) if is_url(source) else source)
    path = place.path
    if not os.path.exists(path):
        return _hub(place, source, split or "train", streaming)
    if path.is_dir() and (path / "dataset_dict.json").exists() | (path / "state.json").exists():
        return _saved(place, source)
    if path.is_dir() and (place.split or place.subset):
        return _hub(place, source, "train", streaming)
    rows = chain.from_iterable(map(_open, _files(path)))
    return _sliced(rows, place) if place.split else rows


def _expand(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _demo(source: str, split: Split | None) -> list[Row]:
    from paft.demo import world

    makers: dict[str, Callable[..., list[Any]]] = {"sft": world.sft_rows, "pref": world.pref_rows, "text": world.plain_text}
    _, _, rest = source.partition(":")
    name, _, named = rest.partition(":")
    if name not in makers:
        raise UsageError(f"there is no demo data set {source!r}", hint=did_you_mean(source, [f"demo:{m}" for m in makers]))
    named = named or split or "train"
    if named not in world.SPLITS:
        raise UsageError(f"{source}: the demo data have no split {named!r}", hint=did_you_mean(named, world.SPLITS))
    rows = makers[name](named)
    return [{"text": row} if isinstance(row, str) else row for row in rows]


# Files


def _kind(file: Path) -> str:
    """The suffix that says how a file is read: that under ``.gz`` and the like."""
    return Path(file.stem).suffix if file.suffix in PACKED else file.suffix


def _files(path: Path) -> list[Path]:
    files = sorted(f for f in path.iterdir() if _kind(f) in READERS and _kind(f) != ".txt") if path.is_dir() else [path]
    if not files or any(_kind(f) not in READERS for f in files):
        raise UsageError(f"{path} is no data file that paft reads", hint=f"use {', '.join(READERS)}")
    if len({_kind(f) for f in files}) > 1:
        raise UsageError(f"{path} holds data files of several kinds", hint="name one of " + ", ".join(f.name for f in files[:4]))
    found = {match[1].lower()[:3] for f in files if len(files) > 1 and (match := _SPLIT.search(f.name))}
    if len(found) > 1:
        raise UsageError(f"{path} holds files of several splits: {', '.join(f.name for f in files[:4])}",
                         hint=f"name one, for example {path}:train")
    return files


def _open(file: Path) -> Iterator[Row]:
    try:
        yield from READERS[_kind(file)](file)
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except PaftError:
        raise
    except Exception as error:  # each reader and packer has its own
        raise UsageError(f"cannot read {file}: {(str(error).splitlines() or [''])[0]}") from error


def _text(file: Path) -> Any:
    """A text file, unpacked if need be."""
    import fsspec
    from fsspec.compression import compr

    if file.suffix == ".zst" and "zstd" not in compr:
        raise ResourceError(f"{file} is packed with zstd, which needs a package that is not here", hint="pip install zstandard")
    opened: Any = fsspec.open(str(file), "rt", compression="infer", encoding="utf-8", newline="")
    return opened.open()


def _lines(file: Path, opened: Any) -> Iterator[str]:
    """Lines of bounded length and, of a packed file, in bounded number: a kilobyte of gzip unpacks to a megabyte of anything."""
    room = _UNPACKED + _RATIO * file.stat().st_size if file.suffix in PACKED else math.inf
    while line := opened.readline(_LONGEST):
        room -= len(line)
        if room < 0:
            raise UsageError(f"{file} unpacks to more than {_RATIO} times its size", hint="unpack it yourself, if you trust it")
        if len(line) == _LONGEST:
            raise UsageError(f"{file} has a line of more than {_LONGEST >> 20} MB", hint="a row is one line")
        yield line


def _jsonl(file: Path) -> Iterator[Row]:
    with _text(file) as opened:
        for number, line in enumerate(_lines(file, opened), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{file}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UsageError(f"{file}:{number}: a row is an object, not {type(row).__name__}")
            yield row


def _json(file: Path) -> Iterator[Row]:
    with _text(file) as opened:
        text = "".join(_lines(file, opened))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        yield from _jsonl(file)  # JSON lines under another name, or it says which line is broken
        return
    if isinstance(rows, dict) and "\n" not in text.strip():
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{file} is no list of objects but {type(rows).__name__}", hint="write [{...}, {...}], or .jsonl")
    yield from rows


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST)  # 128 kB is too little for a document
    with _text(file) as opened:
        dialect = "excel-tab" if _kind(file) == ".tsv" else "excel"
        for number, row in enumerate(csv.DictReader(_lines(file, opened), dialect=dialect), 1):
            if None in row or None in row.values():
                raise UsageError(f"{file}: row {number} has {'more' if None in row else 'fewer'} cells than the header",
                                 hint="quote cells that hold commas or line breaks")
            yield row


def _parquet(file: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        if opened.metadata.num_rows > 1000 + 64 * file.stat().st_size:  # runs of one value take no room
            raise UsageError(f"{file} says that it holds {opened.metadata.num_rows} rows, far too many for its size")
        for batch in opened.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _plain(file: Path) -> Iterator[Row]:
    """Paragraphs if there are any, else lines."""
    with _text(file) as opened:
        text = "".join(_lines(file, opened)).replace("\r\n", "\n")
    yield from ({"text": block.strip()} for block in text.split("\n\n" if "\n\n" in text else "\n") if block.strip())


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".txt": _plain,
}


def _sliced(rows: Iterable[Row], place: Place) -> list[Row]:
    """A split expression on a file, whose only split is ``train``."""
    from datasets import ReadInstruction

    held = list(rows)
    try:
        [part] = ReadInstruction.from_spec(str(place.split)).to_absolute({"train": len(held)})
    except (ValueError, AssertionError) as error:
        raise UsageError(f"{place.name}:{place.split} is no part of a file: {str(error).splitlines()[0]}",
                         hint=f"for example {place.name}:train[:1000]") from None
    return held[part.from_ : part.to]


# datasets


def _saved(place: Place, source: str) -> Iterable[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(place.path))
    except Exception as error:
        raise UsageError(f"cannot read {source}: {str(error).splitlines()[0]}") from error
    if isinstance(found, DatasetDict):
        name = place.split or "train"
        if name not in found:
            raise UsageError(f"{place.name} has no split {name!r}", hint=did_you_mean(name, map(str, found)))
        return found[name]  # type: ignore[return-value]
    return found  # type: ignore[return-value]


def _hub(place: Place, source: str, split: str, streaming: bool) -> Iterable[Row]:
    local = os.path.exists(place.path)
    if not local and (place.name.startswith((".", "/", "~")) or _kind(Path(place.name)) in READERS or place.name.count("/") > 1):
        raise NotFoundError(f"no data at {source}",
                            hint="check the path; a hub id looks like org/name[@revision][#subset][:split]")
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils import logging

    disable_progress_bars()  # and not its own account of an error that we tell
    logging.set_verbosity(logging.CRITICAL)
    try:
        return load_dataset(str(place.path) if local else place.name, name=place.subset, revision=place.revision,
                            split=place.split or split, streaming=streaming)  # type: ignore[return-value]
    except Exception as error:
        said = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())[:150]
        if local or isinstance(error, ValueError):  # an unknown split or subset
            raise UsageError(f"cannot read {source}: {said}", hint="name a #subset and a :split that it has") from error
        raise NotFoundError(f"no data set {source}: {said}",
                            hint="a path that exists wins over a hub id; check spelling, split and HF_HUB_OFFLINE") from error
