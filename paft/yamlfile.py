"""A YAML mapping with the line of every key, so that an error can point at it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paft.errors import NotFoundError, UsageError

_LIMIT, _NODES, _DEPTH = 200_000, 20_000, 60  # characters, values with every alias written out, levels
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """``data`` as plain Python; ``lines`` maps a key path such as ``("trainer", "max_steps")`` to its line, or to the flag
    that set it."""

    data: dict[str, Any]
    lines: dict[tuple[str, ...], int | str]
    name: str

    def where(self, loc: tuple[int | str, ...]) -> str:
        """``file:line`` or the flag of the deepest part of ``loc`` that was given."""
        for depth in range(len(loc), 0, -1):
            line = self.lines.get(tuple(str(part) for part in loc[:depth]))
            if line:
                return line if isinstance(line, str) else f"{self.name}:{line}"
        return self.name


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: ``on`` and ``no`` are words, only true / false are booleans, ``1e-3`` is a number,
    ``1:30`` and ``2026-11-21`` are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in pairs if tag.removeprefix(_TAG) not in ("bool", "int", "float", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
# No leading zero: PyYAML would read it as octal, YAML 1.2 as decimal; text is what neither side misreads.
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_scalar(text: str) -> Any:
    """The value of one ``--set`` item, with the same rules as a file; UsageError where it is no YAML."""
    try:
        return _construct(_Loader(text))[0]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{text[:80]!r} is not valid YAML: {_problem(error)}", hint="quote it: key='\"text\"'") from None


def read_yaml(file: Path) -> Document:
    """Parse a mapping; refuse duplicate keys, tags and anything that is not a mapping (UsageError with the line)."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"no recipe at {file}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no recipe: byte {error.start} is not UTF-8", hint="name a YAML file") from None
    except OSError as error:
        raise NotFoundError(f"cannot read {file}: {error}") from None
    if len(text) > _LIMIT:
        raise UsageError(f"{file} is no recipe: it has {len(text)} characters", hint="name a YAML file")
    try:
        data, lines = _construct(_Loader(text), str(file))
        if not isinstance(data, dict):
            raise UsageError(f"{file} is not a mapping of keys to values")
        return Document(data, lines, str(file))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{line}: not valid YAML: {_problem(error)}") from None
    except RecursionError:
        raise UsageError(f"{file}: an alias contains itself, or the nesting is too deep") from None


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0][:120]


def _construct(loader: _Loader, name: str = "value") -> tuple[Any, dict[tuple[str, ...], int | str]]:
    """A text's value and the line of every key; what its aliases unfold to is bounded, before anything walks it."""
    node, lines = loader.get_single_node(), {}
    if node is None:
        return None, lines
    _index(node, (), lines, name)
    return loader.construct_document(node), lines


def _index(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int | str], name: str) -> None:
    if len(lines) > _NODES or len(path) > _DEPTH:
        raise yaml.YAMLError(f"an alias contains itself, or unfolds to more than {_NODES} values or {_DEPTH} levels")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise UsageError(f"{name}:{key.start_mark.line + 1}: key {key.value!r} appears twice")
            lines[here] = key.start_mark.line + 1
            _index(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, str(i))] = value.start_mark.line + 1
            _index(value, (*path, str(i)), lines, name)
