"""`paft eval`."""

from __future__ import annotations

from typing import Any

import click

from paft.cli import options
from paft.errors import UsageError


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
