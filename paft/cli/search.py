"""`paft search`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.errors import UsageError
from paft.store import Store, is_url


@click.command()
@click.argument("given", nargs=-1, required=True, metavar="RUN|ADAPTER...")
@click.option("--trials", metavar="N", type=click.IntRange(1), default=100, show_default=True,
              help="Finished trials of the study when it ends.")
@click.option("--study", "study", metavar="FILE",
              help="The study: .db, or .journal on a network disk  [default: OUT.db].")
@options.out_option
@click.option("--resume", is_flag=True, help="Continue the study, or join it from another process.")
@click.option("--methods", metavar="NAME,...", help="What may merge  [default: task_arithmetic,ties,dare_linear,dare_ties].")
@click.option("--range", "ranges", multiple=True, metavar="NAME=LOW:HIGH",
              help="Of weight, density, lambda, t or another number of the methods.")
@click.option("--layer-groups", "groups", metavar="N", type=click.IntRange(1), default=1, show_default=True,
              help="Weights of their own for N groups of layers.")
@click.option("--of", "stages", metavar="STAGE,...", help="Which of a run's adapters  [default: its first SFT and DPO].")
@click.option("--sft-data", metavar="DATA", help="Held-out instruction rows to choose by.")
@click.option("--pref-data", metavar="DATA", help="Held-out preference rows to choose by.")
@click.option("--sft-test", metavar="DATA", help="Rows to tell by  [default: half of the held-out ones].")
@click.option("--pref-test", metavar="DATA", help="Likewise.")
@click.option("--base", metavar="MODEL", help="The base  [default: what the adapters name].")
@click.option("--beta", metavar="NUMBER", type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True,
              callback=options.finite,
              help="β of the DPO loss (a run's is in its recipe).")
@click.option("--rows", metavar="NUMBER", type=click.IntRange(1), help="Use at most this many rows of each kind.")
@click.option("--batch-size", metavar="NUMBER", type=click.IntRange(1), help="Rows in one pass.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
              help="Of the base in memory.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
              help="Seed of the search and of DARE's masks.")
@options.executor
@click.option("--workers", type=click.IntRange(1), metavar="N",
              help="With --executor ray: tasks that join the study  [default: as the cluster has room].")
@options.overwrite
@options.common
def search(given: tuple[str, ...], **said: Any) -> None:
    """Search the best merges of adapters, on both objectives.

    Candidates are applied to one base in memory. The result is a Pareto front
    with a recipe for each point. Points are chosen on the validation rows; the
    figures of the test rows stand beside.

    \b
    paft search demo --trials 60
    paft search adapters/sft adapters/dpo --trials 200 \\
        --sft-data sft-heldout.jsonl --pref-data pref-heldout.jsonl
    paft search demo --resume        (continues, or joins from another shell)
    """
    if said["study"] and is_url(said["study"]):
        raise UsageError("a study is a file on a disk", hint="-o URL keeps the study beside the URL")
    names = _listed(said["methods"])
    ranges, executor = dict(_range(item) for item in said["ranges"]), options.executor_of(said)
    if said["workers"] and not executor.spreads:
        raise UsageError("--workers is for --executor ray", hint="here --resume joins a study from another shell")
    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.search.inputs import plan_adapters, plan_run, run_of
    from paft.search.search import check_optuna
    from paft.search.search import search as find

    check_optuna()
    common = {key: said[key] for key in ("rows", "batch_size", "dtype")}
    run = run_of(given[0]) if len(given) == 1 else None
    if run:
        if extra := [f"--{key.replace('_', '-')}" for key in ("sft_data", "pref_data", "base") if said[key]]:
            raise UsageError(f"a run has its own data and base, and {extra[0]} is given", hint="name its adapters to use others")
        plan = plan_run(*run, _listed(said["stages"]), **common)
    else:
        held = {key: said[key] for key in ("sft_test", "pref_test", "beta")}
        plan = plan_adapters(given, said["base"], said["sft_data"], said["pref_data"], **held, **common)
    out = said["out"] or (_near(run[1]) if run else Path("merges/search"))
    study = Path(said["study"]) if said["study"] else None
    settings = {key: said[key] for key in ("trials", "groups", "seed", "resume", "overwrite", "quiet", "workers")}
    report = find(plan, out, study, methods=names, ranges=ranges, executor=executor, **settings)
    if said["as_json"]:
        options.show(report, [], as_json=True)
        return
    _print(report)


def _near(run: Path | Store) -> Path | Store:
    """Where the search of a run goes by default."""
    parent, name = run.apart() if isinstance(run, Store) else (run.parent, run.name)
    return parent / f"{name}-search"


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    from paft.report.render import print_table
    from paft.search.front import COLUMNS

    rows, out = [*report["others"], *report["front"]], report["out"]
    print_table(Console(highlight=False), rows, COLUMNS, legend=True)
    front, kept = report["front"], sum(row["kept"] for row in report["front"])
    click.echo(f"\n{report['trials']} trials, {report['seconds_per_trial']:.1f} s each. "
               f"{len(front)} are on the front of the validation rows, {kept} of these on\n"
               f"that of the test rows too. Nearest to the ideal point: {report['nearest']}.\n"
               f"next: paft merge -c {out}/{report['nearest']}.yaml -o DIR")


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _range(item: str) -> tuple[str, tuple[float, float]]:
    name, _, span = item.partition("=")
    try:
        low, high = (float(part) for part in span.split(":"))
    except ValueError:
        raise UsageError(f"--range {item!r} is not NAME=LOW:HIGH", hint="for example --range density=0.1:0.6") from None
    return name, (low, high)
