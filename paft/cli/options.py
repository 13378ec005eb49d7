"""Options and output that the commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from paft.recipe import find

F = Callable[..., Any]


def recipe_option(command: F) -> F:
    command = click.option("-c", "--recipe", "file", metavar="RECIPE", help="A recipe: a YAML file or a name from `paft recipes ls`.")(command)
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any key of the recipe, e.g. trainer.max_steps=100.")(command)


def output_options(command: F) -> F:
    command = click.option("-o", "--out", type=click.Path(path_type=Path), help="Where the result lands.")(command)
    command = click.option("--overwrite", is_flag=True, help="Replace a target that is not empty.")(command)
    return click.option("--dry-run", is_flag=True, help="Check everything, say what would be done and what it costs, write nothing.")(command)


def common(command: F) -> F:
    command = click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")(command)
    command = click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")(command)
    return click.option("--traceback", is_flag=True, help="On an error, show where it came from.")(command)


def recipe_file(name: str | None) -> Path | None:
    """The file of ``-c``, by path or shipped name."""
    return find(name) if name else None


def show(result: Any, lines: Sequence[str], *, as_json: bool) -> None:
    """A command's result on stdout: JSON, or lines for people."""
    click.echo(json.dumps(result, indent=1, ensure_ascii=False, default=str) if as_json else "\n".join(lines))


def size(count: float) -> str:
    """Bytes for people: ``1.9 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
