"""`paft sparsity-report` and `paft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.errors import UsageError


@click.command("sparsity-report")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--threshold", type=click.FloatRange(min=0, min_open=True), default=1e-5, show_default=True,
              metavar="NUMBER", help="PAFT's measure counts |δ| below this.")
@click.option("--by", type=click.Choice(["layer", "module", "tensor"]), help="Break the numbers down.")
@click.option("--markdown", is_flag=True, help="A Markdown table on stdout.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False),
              help="Draw the share per layer (PAFT, Figure 2) into this file.")
@options.common
def sparsity_report(adapters: tuple[str, ...], threshold: float, by: Any, markdown: bool, plot: Path | None, as_json: bool,
                    **_: Any) -> None:
    """Tell sparse adapters from small ones.

    PAFT's measure, the share of entries below a threshold, beside measures that do not change with scale.

    \b
    paft sparsity-report adapters/sft adapters/sft-l1 adapters/dpo
    paft sparsity-report adapters/sft-l1 --by layer --plot sparsity.png
    paft sparsity-report adapters/dpo --json
    """
    from rich.console import Console

    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.adapter import read_adapter
    from paft.provenance import to_json
    from paft.report.render import print_table, to_markdown
    from paft.report.sparsity import sparsity
    from paft.report.sparsity_tables import breakdown, summary

    reports = [sparsity(read_adapter(path), threshold=threshold) for path in adapters]
    if plot:
        from paft.report.plots import sparsity_figure

        sparsity_figure(reports, plot)
    tables = [(None, *summary(reports))]
    if by:
        tables += [(report.name, *breakdown(report, by)) for report in reports]
    if as_json:
        click.echo(to_json([report.to_dict() for report in reports]), nl=False)
        return
    if markdown:
        click.echo("\n".join(to_markdown(rows, columns) for _, rows, columns in tables), nl=False)
        return
    console = Console(highlight=False)
    for title, rows, columns in tables:
        print_table(console, rows, columns, title, legend=bool(title))
    for report in reports:
        console.print(f"{report.name}: {report.verdict.sentence}", markup=False)
        if report.note:
            console.print(f"{report.name}: {report.note}", markup=False)
    if plot:
        console.print(f"figure: {plot}", markup=False)


@click.command("eval")
@click.argument("candidates", nargs=-1, required=True, metavar="MODEL|ADAPTER...")
@click.option("--sft-data", metavar="DATA", help="Held-out instruction rows.")
@click.option("--pref-data", metavar="DATA", help="Held-out preference rows.")
@click.option("--text", metavar="DATA", help="Neutral text, to measure forgetting.")
@click.option("--base", metavar="MODEL", help="Base of the adapters and DPO reference  [default: what an adapter names].")
@click.option("--generate", metavar="TOKENS", type=click.IntRange(0), default=0, show_default=True,
              help="Score greedy answers of at most this length too.")
@click.option("--rows", metavar="NUMBER", type=click.IntRange(1), help="Use at most this many rows of each kind.")
@click.option("--beta", metavar="NUMBER", type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True,
              help="β of the DPO loss.")
@click.option("--batch-size", metavar="NUMBER", type=click.IntRange(1), default=16, show_default=True, help="Rows in one pass.")
@options.common
def evaluate(candidates: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Score models and adapters on held-out data.

    Both objectives, preference accuracy, forgetting, and exact match of generated answers.

    \b
    paft eval adapters/sft adapters/dpo merges/ties --generate 16 \\
        --sft-data demo:sft:test --pref-data demo:pref:test --text demo:text:test
    """
    if not (given["sft_data"] or given["pref_data"] or given["text"]):
        raise UsageError("nothing to evaluate on", hint="pass --sft-data, --pref-data or --text")
    from rich.console import Console

    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.candidates import score
    from paft.provenance import to_json
    from paft.report.headtohead import columns_of
    from paft.report.render import print_table

    rows = score(list(candidates), **{key: value for key, value in given.items() if key != "traceback"})
    if as_json:
        click.echo(to_json(rows), nl=False)
        return
    print_table(Console(highlight=False), rows, columns_of(rows), legend=True)
