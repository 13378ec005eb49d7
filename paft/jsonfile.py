"""JSON that strangers wrote: bounded in size, no key twice, no depth that ends the interpreter; and the header of safetensors.

    file.safetensors:  8 bytes n, little-endian | n bytes of JSON {name: {dtype, shape, data_offsets}} | data

Nothing here imports torch. The safetensors library makes the same checks only when it opens a file, and names neither file nor
tensor; paft reads headers itself because it reads tensors by rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any, Protocol

from paft.errors import MismatchError, NotFoundError

LIMIT = 32_000_000  # bytes: 91,000 tensors (DeepSeek-V3) take 11 MB; as Python objects a hostile text is up to 20 times as large
_AGAIN = "copy or download it again"
_DIMENSIONS, _LARGEST, _DIGITS = 32, 1 << 62, 40
_EMPTY = 1 << 31  # rows or columns of a tensor without entries: loops over them must end
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
          "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}  # bytes an entry


def parse(text: str | bytes) -> Any:
    """``json.loads`` that refuses a key which appears twice; every fault is a ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises NotFoundError or MismatchError in one line."""
    try:
        if file.stat().st_size > LIMIT:
            raise MismatchError(f"{file} is larger than {LIMIT // 10**6} MB", hint="no configuration or index is")
        value = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{file} does not exist") from error
    except ValueError as error:
        raise MismatchError(f"{file} is not JSON", hint=_AGAIN) from error
    if not isinstance(value, dict):
        raise MismatchError(f"{file} holds no JSON object")
    return value


class Readable(Protocol):
    """A file of tensors: a Path, or one that is elsewhere (`paft.store.ranged`)."""

    def stat(self) -> Any: ...

    def open(self, mode: str, buffering: int = -1) -> IO[Any]: ...


def read_header(file: Readable) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and the offset of its data; MismatchError where the file is not whole.

    Every entry of it (but ``__metadata__``) has a type, a shape and a span of bytes inside the file, which is as long as its
    type and shape say.
    """
    broken = MismatchError(f"{file} is not a complete safetensors file", hint=_AGAIN)
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if total < 8 or length > min(total - 8, LIMIT):
                raise broken
            header = parse(stream.read(length))
    except FileNotFoundError as error:
        raise NotFoundError(f"{file} does not exist") from error
    except ValueError as error:
        raise broken from error
    if not isinstance(header, dict):
        raise broken
    for name, entry in header.items():
        if name != "__metadata__":
            _check_entry(file, name, entry, total - 8 - length)
    return header, 8 + length


def _check_entry(file: Readable, name: str, entry: Any, size: int) -> None:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _DIMENSIONS
                and all(type(n) is int and 0 <= n < _LARGEST for n in (*shape, begin, end))):
            raise ValueError(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{file} has a malformed safetensors header, at {name[:80]}", hint=_AGAIN) from error
    if not begin <= end <= size:
        raise MismatchError(f"{file} is not a complete safetensors file: {name[:80]} lies beyond its end", hint=_AGAIN)
    if 0 in shape and math.prod(filter(None, shape)) > _EMPTY:
        raise MismatchError(f"{file}: {name[:80]} has an absurd shape, {shape}", hint=_AGAIN)
    if dtype in WIDTHS and end - begin != math.prod(shape) * WIDTHS[dtype]:
        raise MismatchError(f"{file}: the header's offsets of {name[:80]} do not fit", hint=_AGAIN)
