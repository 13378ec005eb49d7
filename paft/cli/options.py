"""Options and output that the commands share."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from paft import store
from paft.catalog import find
from paft.errors import UsageError
from paft.progress import duration as duration
from paft.provenance import to_json
from paft.store import Store, is_url

F = Callable[..., Any]


def stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """The decorators as one; `--help` lists their options in this order."""
    def wrap(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command
    return wrap


class _Place(click.ParamType):
    """A directory of this machine, as a Path, or one behind a URL, as a `paft.store.Store`."""

    name = "PATH|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Store(value) if isinstance(value, str) and is_url(value) else Path(value)


PLACE = _Place()
out_option = click.option("-o", "--out", type=PLACE, help="The directory to make; also behind s3:// or gs://.")
recipe_option = click.option("-c", "--recipe", "file", metavar="RECIPE", help="A YAML file, or a name from `paft recipes ls`.")
dry_run = click.option("--dry-run", is_flag=True, help="Check all, say what would be done and what it costs, write nothing.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace a target that is not empty.")
allow_base_mismatch = click.option("--allow-base-mismatch", is_flag=True, help="Accept a base of other content, as another type.")


def set_option(example: str) -> Callable[[F], F]:
    """``--set``, with an example that suits the command's recipe."""
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help=f"Set any key of the recipe, e.g. {example}.")


def finite(ctx: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """A callback: no range of click's refuses nan."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number", ctx, option)
    return value


executor = stack(
    click.option("--executor", "executor_name", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                 help="ray: stages as tasks of a Ray cluster that shares this disk."),
    click.option("--address", metavar="HOST:PORT", help="Of the cluster, or auto, or local  [default: one that runs here, or"
                 " one of our own]."),
)
common = stack(
    click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes."),
    click.option("--traceback", is_flag=True, help="On an error, show where it came from."),
)


@contextmanager
def making(out: Path | Store, *, overwrite: bool, resume: bool = False, dry_run: bool = False) -> Iterator[Path]:
    """Where a command makes one artefact: ``out``, or for a URL a place of this machine, which is sent there when it is made.

    With ``resume`` what was begun here goes on. MismatchError where something stands behind the URL.
    """
    if isinstance(out, Path):
        yield out
        return
    from paft.train.work import leads

    with store.making(out, overwrite=overwrite, resume=resume, dry_run=dry_run, sends=leads()) as place:
        yield place


def recipe_file(name: str | None) -> Path | None:
    """The file of ``-c``, by path or shipped name."""
    return find(name) if name else None


def executor_of(given: dict[str, Any]) -> Any:
    """The executor of ``--executor`` and ``--address``, which are taken out of ``given``."""
    from paft.executor import Executor

    name, address = given.pop("executor_name"), given.pop("address")
    if address and name == "local":
        raise UsageError("--address is of a Ray cluster", hint="add --executor ray")
    return Executor(name, address, given.get("quiet", False))


def show(result: Any, lines: Sequence[str], *, as_json: bool) -> None:
    """A command's result on stdout: JSON, or lines for people."""
    click.echo(to_json(result) if as_json else "\n".join(lines), nl=not as_json)


def hang(rows: Sequence[tuple[str, ...]], width: int = 79) -> list[str]:
    """Rows of cells as aligned columns; the last cell is text, wrapped below itself."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines: list[str] = []
    for *cells, text in rows:
        lead = "".join(f"{cell:<{size}}  " for cell, size in zip(cells, widths, strict=True))
        lines += textwrap.wrap(text, width, initial_indent=lead, subsequent_indent=" " * len(lead),
                               break_on_hyphens=False) or [lead.rstrip()]
    return lines


def folded(doc: str, width: int = 79) -> list[str]:
    """A docstring's paragraphs wrapped to the terminal; indented blocks (equations, tables) as they are."""
    lines: list[str] = []
    for part in doc.split("\n\n"):
        block = part.startswith("    ")
        lines += [*(part.splitlines() if block else textwrap.wrap(part.replace("\n", " "), width)), ""]
    return lines[:-1]


def size(count: float) -> str:
    """Bytes for people: ``1.9 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
