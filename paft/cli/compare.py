"""`paft compare`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.errors import UsageError


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="DIR...|RECIPE")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="The figure, as .png, .svg or .pdf.")
@click.option("--markdown", is_flag=True, help="A Markdown table on stdout.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="A page with table and figure that needs nothing else.")
@options.common
def compare(inputs: tuple[str, ...], **given: Any) -> None:
    """Put trainings beside each other.

    Trainings with held-out rows: both objectives, gaps to the optima, ideal distance, time, tokens and memory; --plot
    draws their ways through the objective space. Those that differ in the seed alone become one row, mean ± standard error.

    \b
    paft compare adapters/mix adapters/alright adapters/maxright --plot ways.png
    """
    if given["plot"] and given["plot"].suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{given['plot']} is not a figure's name", hint="end it in .png, .svg or .pdf")
    from paft.compare import TRAINING, kind_of, trainings

    paths = [Path(each) for each in inputs]
    assert {kind_of(path) for path in paths} == {TRAINING}
    _trainings(trainings(paths), given)


def _trainings(groups: Sequence[Any], given: dict[str, Any]) -> None:
    from paft.report.training_tables import findings, summary

    rows, columns = summary(groups)
    said = findings(groups)
    if given["plot"]:
        from paft.report.plots import save
        from paft.report.trajectory import training_figure

        save(training_figure(groups), given["plot"])
    if given["html"]:
        from paft.report.page import training_page

        training_page(groups, given["html"], said)
    data = {"kind": "trainings", "schema": 1, "rows": rows, "findings": said,
            "evaluations": {one.name: list(one.evaluations) for group in groups for one in group.members}}
    _show(data, rows, columns, said, given)


def _show(data: dict[str, Any], rows: Sequence[Any], columns: Sequence[Any], said: Sequence[str], given: dict[str, Any]) -> None:
    """JSON, Markdown or a terminal table on stdout, with the sentences below."""
    from paft.provenance import to_json
    from paft.report.render import print_table, to_markdown

    if given["as_json"]:
        click.echo(to_json(data), nl=False)
        return
    if given["markdown"]:
        click.echo("\n".join([to_markdown(rows, columns), *(f"- {line}" for line in said)]))
        return
    from rich.console import Console

    print_table(Console(highlight=False), rows, columns, legend=True)
    click.echo("\n".join(["", *(textwrap.fill(line, 79, subsequent_indent="  ") for line in said)]))
    for what, name in (("plot", "figure"), ("html", "page")):
        if given[what]:
            click.echo(f"{name}: {given[what]}")
