"""`paft sparsity-report` and `paft interference`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.errors import UsageError

by_option = click.option("--by", type=click.Choice(["layer", "module", "tensor"]), help="Break the numbers down.")
outputs = options.stack(
    click.option("--markdown", is_flag=True, help="Markdown tables on stdout."),
    click.option("--html", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
                 help="A page with tables and figures that needs nothing else."),
    click.option("--plot", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
                 help="The figure alone, as .png, .svg or .pdf."),
)
Table = tuple[str | None, list[dict[str, Any]], list[Any]]


@click.command("sparsity-report")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER|MODEL|DELTA...")
@click.option("--base", metavar="MODEL", help="The base: needed for models; an adapter is then measured whole, beside W.")
@click.option("--threshold", type=click.FloatRange(min=0, min_open=True), default=1e-5, show_default=True,
              metavar="NUMBER", help="PAFT's measure counts |δ| below this.")
@by_option
@click.option("--sweep", is_flag=True, help="The share below other thresholds too, 1e-8 to 1e-2.")
@click.option("--fast", is_flag=True, help="Norms and ranks from the factors alone, in seconds.")
@click.option("--probe", "data", metavar="DATA", help="Held-out loss with the delta on, pruned, scaled and off (needs --base).")
@click.option("--rows", metavar="NUMBER", type=click.IntRange(1), help="Use at most this many rows of DATA.")
@outputs
@options.allow_base_mismatch
@options.common
def sparsity_report(adapters: tuple[str, ...], **given: Any) -> None:
    """Tell sparse adapters from small ones.

    PAFT's measure, the share of entries below a threshold, beside measures that do not change with scale.

    \b
    paft sparsity-report adapters/sft adapters/sft-l1 adapters/dpo
    paft sparsity-report adapters/sft-l1 --by layer --html report.html
    paft sparsity-report org/tuned-model --base org/base --json
    """
    if given["data"] and not given["base"]:
        raise UsageError("--probe runs the model, so it needs the base", hint="pass --base MODEL")
    if given["fast"] and (given["data"] or given["plot"] or given["html"] or given["sweep"]):
        raise UsageError("--fast looks at the factors alone: no --probe, --sweep, --plot or --html", hint="leave out --fast")
    _check_figure(given["plot"])

    from paft.models import quiet_libraries, set_threads

    (quiet_libraries if given["data"] else set_threads)()
    from paft.report.sources import open_sources

    sources = open_sources(adapters, given["base"], allow_base_mismatch=given["allow_base_mismatch"])
    if given["fast"]:
        _fast(sources, given)
        return
    from paft.report.sparsity import sparsity
    from paft.report.sparsity_tables import breakdown, summary, sweep

    with _Bars(given["quiet"]) as bars:
        reports = [sparsity(source, threshold=given["threshold"], progress=bars(source.name)) for source in sources]
        probes = [_probe(source, report, given, bars) for source, report in zip(sources, reports, strict=True)]
    tables: list[Table] = [(None, *summary(reports))]
    if given["sweep"]:
        tables.append(("Share below other thresholds", *sweep(reports)))
    if given["by"]:
        tables += [(report.name, *breakdown(report, given["by"])) for report in reports]
    said = [f"{report.name}: {line}" for report, found in zip(reports, probes, strict=True)
            for line in (report.verdict.sentence, found and found.sentence, report.note) if line]
    if given["plot"]:
        from paft.report.plots import sparsity_figure

        sparsity_figure(reports, given["plot"])
    if given["html"]:
        from paft.report.page import sparsity_page

        sparsity_page(reports, given["html"], said)
    data = [report.to_dict() | ({"probe": found.to_dict()} if found else {})
            for report, found in zip(reports, probes, strict=True)]
    _show(data, tables, said, given)


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="A B [...]")
@click.option("--base", metavar="MODEL", help="The base: needed for models, and for adapters beside models.")
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), default=0.2, show_default=True, metavar="SHARE",
              help="The share of entries that TIES would keep.")
@by_option
@click.option("--fast", is_flag=True, help="Cosines, norms and angles from the factors alone, in seconds.")
@outputs
@options.allow_base_mismatch
@options.common
def interference(adapters: tuple[str, ...], **given: Any) -> None:
    """How two adapters meet, and which merge to try.

    Cosine, sign conflicts, overlap of supports, principal angles, what TIES would trim and lose, all beside chance.

    \b
    paft interference adapters/sft-l1 adapters/dpo
    paft interference adapters/sft adapters/dpo --by layer --html report.html
    """
    if len(adapters) < 2:
        raise UsageError("interference is between two", hint="paft interference ADAPTER ADAPTER")
    if given["fast"] and (given["plot"] or given["html"]):
        raise UsageError("--fast looks at the factors alone: no --plot or --html", hint="leave out --fast")
    _check_figure(given["plot"])

    from itertools import combinations

    from paft.models import set_threads

    set_threads()
    from paft.report.advice import advise
    from paft.report.interference import interference as measure
    from paft.report.interference_tables import breakdown, summary, worst
    from paft.report.sources import open_sources

    sources = open_sources(adapters, given["base"], allow_base_mismatch=given["allow_base_mismatch"])
    paths = dict(zip([source.name for source in sources], adapters, strict=True))
    with _Bars(given["quiet"]) as bars:
        found = [measure(a, b, density=given["density"], fast=given["fast"], progress=bars(f"{a.name}, {b.name}"))
                 for a, b in combinations(sources, 2)]
    tables: list[Table] = [(None, *summary(pair)) for pair in found]
    if given["by"]:
        tables += [(" and ".join(pair.names), *breakdown(pair, given["by"])) for pair in found]
    if given["fast"]:
        said = ["From the factors alone: without --fast come signs, overlaps, TIES and what to try."]
        _show([pair.to_dict() for pair in found], tables, said, given)
        return
    advice = [advise(pair, paths) for pair in found]
    said = [f"{' and '.join(pair.names)}: " * (len(found) > 1) + line
            for pair, each in zip(found, advice, strict=True) for line in (worst(pair), *each.lines)]
    if given["plot"]:
        from paft.report.maps import interference_figure

        interference_figure(found, given["plot"])
    if given["html"]:
        from paft.report.page import interference_page

        interference_page(found, given["html"], said)
    data = [pair.to_dict() | {"advice": each.to_dict()} for pair, each in zip(found, advice, strict=True)]
    _show(data, tables, said, given)


def _fast(sources: Sequence[Any], given: dict[str, Any]) -> None:
    from paft.report.norms import breakdown, norms, summary

    reports = [norms(source) for source in sources]
    tables: list[Table] = [(None, *summary(reports))]
    if given["by"]:
        tables += [(report.name, *breakdown(report, given["by"])) for report in reports]
    said = ["From the factors alone: without --fast come shares, scale-free measures and the verdict."]
    _show([report.to_dict() for report in reports], tables, said, given)


def _probe(source: Any, report: Any, given: dict[str, Any], bars: _Bars) -> Any:
    if not given["data"]:
        return None
    from paft.probe import probe

    return probe(source, report, given["base"], given["data"], rows=given["rows"], progress=bars(f"probe {source.name}"))


def _show(data: list[dict[str, Any]], tables: Sequence[Table], said: Sequence[str], given: dict[str, Any]) -> None:
    """JSON, Markdown or terminal tables on stdout, with the sentences below."""
    from rich.console import Console

    from paft.provenance import to_json
    from paft.report.render import print_table, to_markdown

    if given["as_json"]:
        click.echo(to_json(data), nl=False)
        return
    if given["markdown"]:
        text = [f"**{title}**\n\n" * bool(title) + to_markdown(rows, columns) for title, rows, columns in tables]
        click.echo("\n".join([*text, *(f"- {line}" for line in said)]))
        return
    console = Console(highlight=False)
    for index, (title, rows, columns) in enumerate(tables):
        told = [column.help for column in columns] in ([column.help for column in after] for _, _, after in tables[index + 1 :])
        print_table(console, rows, columns, title, legend=not told)
        if not told and any(column.help for column in columns):
            console.print()
    for line in said:
        console.print(line, markup=False)
    for what in ("plot", "html"):
        if given.get(what):
            console.print(f"{'figure' if what == 'plot' else 'page'}: {given[what]}", markup=False)


def _check_figure(path: Path | None) -> None:
    """Refuse an unknown format before the work, not after it."""
    if path and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path} is not a figure's name", hint="end it in .png, .svg or .pdf")


class _Bars:
    """A progress bar for one job after another."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.stack = quiet, ExitStack()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def __call__(self, name: str) -> Any:
        from paft.progress import Progress

        self.stack.close()
        bar = self.stack.enter_context(Progress(name, 1, quiet=self.quiet))

        def show(done: int, total: int, note: str) -> None:
            bar.total = total
            bar(done, note)

        return show
