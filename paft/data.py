"""Data sets: read, checked and brought to one of four shapes before any model is loaded.

    sft       prompt, completion            (or ``text``, trained on whole)
    pref      prompt, chosen, rejected
    unpaired  prompt, completion, label     (true: desirable; a pair gives one row of each kind)
    text      text

Prompts and answers are strings or lists of chat messages (TRL's standard and conversational formats). ``messages`` rows are
unrolled: every assistant turn becomes a row whose prompt is all that came before, so only answers are trained on.

A source is a file (.jsonl, .json, .parquet, .csv), a directory of such files, ``demo:sft|pref|text[:split]``, or a hub id
``org/name[@revision][:split]``. Everything raises NotFoundError (no such data) or UsageError (wrong columns, empty rows).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft.errors import MismatchError, NotFoundError, PaftError, UsageError, did_you_mean
from paft.hub import split_revision
from paft.recipe import Splits

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Role = Literal["sft", "pref", "unpaired", "text"]
Split = Literal["train", "validation", "test"]
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(source: str, role: Role, split: Split | None = None) -> list[Row]:
    """The rows of ``source`` in the shape of ``role``; see the module's docstring for what a source is."""
    rows = list(_normalise(_read(source, split), role, source))
    if not rows:
        raise UsageError(f"{source} holds no rows")
    return rows


def splits(spec: Splits | str, role: Role, fraction: float = 0.1) -> dict[str, list[Row]]:
    """Rows of train, validation and test, with no row in two of them.

    Splits that the recipe names are used as they are (a row that is in two of them is a MismatchError). A missing one is cut out
    of ``train``: ``fraction`` of the distinct prompts, chosen by the hash of the prompt, so the cut depends on the content alone
    and rows that share a prompt, or come from one conversation, stay together.
    """
    spec = Splits(train=spec) if isinstance(spec, str) else spec
    if spec.train.startswith("demo:") and spec.validation is None and spec.test is None:
        return {name: load_rows(spec.train, role, name) for name in ("train", "validation", "test")}  # type: ignore[arg-type]
    found = {"train": load_rows(spec.train, role)}
    for name, source in (("validation", spec.validation), ("test", spec.test)):
        if source is None:
            found["train"], found[name] = hold_out(found["train"], fraction, name)
        else:
            found[name] = load_rows(source, role)
    check_leakage(found)
    return found


def hold_out(rows: list[Row], fraction: float, salt: str = "") -> tuple[list[Row], list[Row]]:
    """(kept, held out): about ``fraction`` of the distinct prompts, by hash; the same rows whatever their order."""
    limit = int(fraction * 2**32)
    held = [int.from_bytes(hashlib.sha256((salt + _prompt_key(row)).encode()).digest()[:4]) < limit for row in rows]
    kept = [row for row, out in zip(rows, held, strict=True) if not out]
    gone = [row for row, out in zip(rows, held, strict=True) if out]
    if fraction and (not kept or not gone):
        raise UsageError(f"{len(rows)} rows are too few to hold out {fraction:.0%}", hint="name validation and test data instead")
    return kept, gone


def check_leakage(found: dict[str, list[Row]]) -> None:
    """Evaluation data is never training data: an identical row in two splits is an error."""
    seen: dict[str, str] = {}
    for name, rows in found.items():
        for key in {json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows}:
            if seen.setdefault(key, name) != name:
                raise MismatchError(f"the same row is in {seen[key]} and {name}: {key[:80]}...",
                                    hint="remove it from one of them")


def content_hash(rows: list[Row]) -> str:
    """sha256 of the rows in order, independent of file format."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _prompt_key(row: Row) -> str:
    """What a row asks; of a conversation all up to the first user turn, so that its unrolled turns stay together."""
    asked = row.get("prompt", row.get("text"))
    if isinstance(asked, list):
        first = next((i for i, turn in enumerate(asked) if turn["role"] == "user"), len(asked) - 1)
        asked = _plain(asked[: first + 1])
    return json.dumps(asked, sort_keys=True, ensure_ascii=False)


def _read(source: str, split: Split | None) -> list[Row]:
    if source.split(":")[0] == "demo":
        return _demo(source, split)
    path = Path(os.path.expanduser(source))
    if path.exists():
        return _files(path)
    return _hub(source, split)


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


def _files(path: Path) -> list[Row]:
    files = sorted(f for f in path.iterdir() if f.suffix in READERS) if path.is_dir() else [path]
    if not files or any(f.suffix not in READERS and f.suffix != ".txt" for f in files):
        raise UsageError(f"{path} is no data file that paft reads", hint=f"use {', '.join(READERS)} (or .txt for plain text)")
    if len({f.suffix for f in files}) > 1:
        raise UsageError(f"{path} holds data files of several kinds", hint="name one of " + ", ".join(f.name for f in files[:4]))
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            return [{"text": block.strip()} for block in text.split("\n\n" if "\n\n" in text else "\n") if block.strip()]
        if files[0].suffix == ".jsonl":
            return [row for f in files for row in _jsonl(f)]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    load_dataset = _loader()
    try:
        return load_dataset(READERS[files[0].suffix], data_files=[str(f) for f in files], split="train").to_list()
    except Exception as error:
        raise UsageError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{file}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UsageError(f"{file}:{number}: a row is an object, not {type(row).__name__}")
            yield row


def _hub(source: str, split: Split | None) -> list[Row]:
    name, _, named = source.partition(":")
    repo, revision = split_revision(name)
    if repo.startswith((".", "/", "~")) or Path(repo).suffix in READERS or repo.count("/") > 1:
        raise NotFoundError(f"no data at {source}", hint="check the path; a hub id looks like org/name[@revision][:split]")
    load_dataset = _loader()
    try:
        return load_dataset(repo, revision=revision, split=named or split or "train").to_list()
    except Exception as error:
        raise NotFoundError(f"no data set {source}: {str(error).splitlines()[0][:150]}",
                            hint="a path that exists wins over a hub id; check spelling, split and HF_HUB_OFFLINE") from error


def _loader() -> Callable[..., Any]:
    """`datasets.load_dataset` without its bars and its own account of an error that we tell."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils import logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    return load_dataset


def _normalise(rows: list[Row], role: Role, source: str) -> Iterator[Row]:
    if not rows:
        return
    shape = {"sft": _sft_row, "pref": _pref_row, "unpaired": _unpaired_row, "text": _text_row}[role]
    for number, row in enumerate(rows, 1):
        try:
            yield from shape(row)
        except KeyError:
            raise UsageError(f"{source}: row {number} has columns {sorted(row)}, none of the formats for {role}",
                             hint=f"expected {EXPECTED[role]}") from None
        except PaftError as error:
            raise UsageError(f"{source}: row {number}: {error.message}", hint=error.hint) from None


EXPECTED = {
    "sft": "`messages`, or `prompt` and `completion`, or `text`",
    "pref": "`prompt`, `chosen` and `rejected` (or `chosen` and `rejected` that begin with the same prompt)",
    "unpaired": "`prompt`, `completion` and `label` (or pairs: `prompt`, `chosen` and `rejected`)",
    "text": "`text`",
}


def _sft_row(row: Row) -> Iterator[Row]:
    if "messages" in row:
        turns = row["messages"]
        _check_messages(turns, "messages")
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i]
        if not answers:
            raise UsageError("`messages` has no assistant turn to learn", hint="drop such rows")
        for i in answers:
            _check_messages(turns[: i + 1], "messages")
            yield {"prompt": _plain(turns[:i]), "completion": _plain([turns[i]])}
        return
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        _check_answer(prompt, completion, "completion")
        yield {"prompt": prompt, "completion": completion}
        return
    yield from _text_row(row)


def _pref_row(row: Row) -> Iterator[Row]:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row and not (isinstance(row["prompt"], str) and isinstance(chosen, list)):
        prompt = row["prompt"]
    else:  # with a `prompt` string beside whole conversations (UltraFeedback binarized), the conversations say it all
        prompt, chosen, rejected = _common_prompt(chosen, rejected)
    _check_answer(prompt, chosen, "chosen")
    _check_answer(prompt, rejected, "rejected")
    if chosen == rejected:
        raise UsageError("chosen and rejected are identical", hint="drop such rows: they carry no preference")
    yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _unpaired_row(row: Row) -> Iterator[Row]:
    if "chosen" in row:
        for pair in _pref_row(row):
            for key in ("chosen", "rejected"):
                yield {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
        return
    prompt, completion, label = row["prompt"], row["completion"], row["label"]
    _check_answer(prompt, completion, "completion")
    if label not in (True, False):
        raise UsageError(f"`label` must be true or false, got {label!r}")
    yield {"prompt": prompt, "completion": completion, "label": bool(label)}


def _text_row(row: Row) -> Iterator[Row]:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise UsageError("`text` is empty or no string")
    yield {"text": row["text"]}


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The shared beginning of two conversations (TRL's implicit prompt); strings need an explicit one."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise UsageError("`prompt` is missing and cannot be told from plain strings", hint="add a `prompt` column")
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if not length:
        raise UsageError("`chosen` and `rejected` do not begin with the same message", hint="add a `prompt` column of messages")
    return chosen[:length], chosen[length:], rejected[length:]


def _check_answer(prompt: Any, answer: Any, name: str) -> None:
    if isinstance(prompt, list) != isinstance(answer, list):
        raise UsageError(f"`prompt` and `{name}` must both be strings or both be lists of messages")
    if isinstance(prompt, list):
        _check_messages(prompt, "prompt")
        _check_messages(answer, name)
    elif not isinstance(prompt, str) or not isinstance(answer, str):
        raise UsageError(f"`prompt` and `{name}` must be strings or lists of messages")
    elif not answer.strip():
        raise UsageError(f"`{name}` is empty")


def _check_messages(turns: Any, name: str) -> None:
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"`{name}` is not a non-empty list of messages")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise UsageError(f"`{name}`: a message needs a `role` and a `content` string, got {str(turn)[:60]}")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        raise UsageError(f"`{name}` ends in an empty answer")


def _plain(turns: list[Row]) -> list[Row]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def dataset(rows: list[Row]) -> Dataset:
    """Rows as a `datasets.Dataset`, in memory."""
    from datasets import Dataset, disable_progress_bars
    disable_progress_bars()
    return Dataset.from_list(rows)
