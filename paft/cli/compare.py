"""`paft compare`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from paft.catalog import catalog, find
from paft.cli import options
from paft.errors import UsageError
from paft.progress import say
from paft.provenance import MANIFEST
from paft.store import Store, fetched, is_url

Table = tuple[str, list[dict[str, Any]], list[Any]]


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="DIR...|RECIPE")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="The figure, as .png, .svg or .pdf.")
@click.option("--markdown", is_flag=True, help="Markdown tables on stdout, with every column.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="A page with tables and figures that needs nothing else.")
@click.option("--seeds", metavar="N", type=click.IntRange(1), help="Of a recipe: run it with so many seeds  [default: 5].")
@options.set_option("model=org/name")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Of a recipe: trainings side by side, as in `paft run`.")
@options.executor
@click.option("-o", "--out", type=options.PLACE,
              help="Runs: write compare.md, .json, .csv, .html and .png here  [default: of a recipe merges/NAME-seeds].")
@options.dry_run
@options.common
def compare(inputs: tuple[str, ...], **given: Any) -> None:
    """Put trainings, or seeds of a run, side by side.

    Trainings with held-out rows: both objectives, gaps to the optima, ideal distance, time, tokens and memory; --plot
    draws their ways through the objective space. Those that differ in the seed alone become one row, mean ± standard error.

    Runs of one recipe with several seeds, or a recipe, which is run first: every number as mean ± standard error,
    and paired bootstrap intervals beside training in sequence and beside DPO alone.

    \b
    paft compare adapters/mix adapters/alright adapters/maxright --plot ways.png
    paft compare merges/demo-0 merges/demo-1 merges/demo-2 -o merges/demo-seeds
    paft compare demo --seeds 5
    """
    if given["plot"] and given["plot"].suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{given['plot']} is not a figure's name", hint="end it in .png, .svg or .pdf")
    from paft.compare import RUN, TRAINING, kind_of, trainings
    from paft.report.seeds import study

    paths = [fetched(each, ["*.json", "*.jsonl"]) if is_url(each) else Path(each) for each in inputs]
    estimates = [path for path in paths if path.name.startswith("optima-") and path.is_dir() and not (path / MANIFEST).is_file()]
    if estimates:  # `paft compare study/*` names them too
        say(f"note: {estimates[0]} left out: it holds the trainings that estimated f*", quiet=given["quiet"])
        paths = [path for path in paths if path not in estimates]
    if not paths:
        raise UsageError("nothing to compare", hint=f"name the trainings in it: {estimates[0]}/*")
    if len(paths) == 1 and not (paths[0] / MANIFEST).is_file() and (paths[0].is_file() or str(paths[0]) in catalog()):
        _recipe(str(paths[0]), given)
        return
    if options.executor_of(given).spreads:
        raise UsageError(f"--executor is for a recipe, and {paths[0]} is none", hint="paft compare RECIPE --seeds 5")
    for_recipes = [name for name in ("seeds", "sets", "workers", "dry_run") if given[name]]
    if for_recipes:
        raise UsageError(f"--{for_recipes[0].removesuffix('s').replace('_', '-')} is for a recipe, and {paths[0]} is none"
                         .replace("--seed ", "--seeds ").replace("--worker ", "--workers "), hint="paft compare RECIPE --seeds 5")
    kinds = {kind_of(path): path for path in paths}
    if len(kinds) > 1:
        raise UsageError(f"{kinds[TRAINING]} is a training and {kinds[RUN]} a run of many",
                         hint="compare the ones or the others")
    if TRAINING in kinds:
        if given["out"]:
            raise UsageError("-o is for runs", hint="--html FILE and --plot FILE write what is known of trainings")
        _trainings(trainings(paths), given)
    else:
        _study(study(paths), given)


def _recipe(name: str, given: dict[str, Any]) -> None:
    """Run a recipe with several seeds, as far as that has not been done, and compare them."""
    from paft.recipe import RunRecipe, load

    recipe, executor = load(RunRecipe, find(name), given["sets"]), options.executor_of(given)
    given["out"] = given["out"] or Path("merges") / f"{recipe.name}-seeds"
    count = given["seeds"] or 5

    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.compare import places, run_seeds
    from paft.report.seeds import study

    if given["dry_run"]:
        from paft.run import plan

        plans = {seed: plan(recipe.model_copy(update={"seed": seed}), place, workers=given["workers"], executor=executor)
                 for seed, place in places(recipe, given["out"], count).items()}
        lines = [f"would run {recipe.name} with {count} seeds into {given['out']}"]
        lines += [f"  seed {seed}: {sum(stage['done'] for stage in each['train'])} of {len(each['train'])} trainings kept, "
                  f"{options.duration(each['seconds'])} of training, {len(each['merge'])} merges"
                  for seed, each in plans.items()]
        keys = {"trainings": "seconds", "merges": "merge_seconds", "evaluation": "evaluate_seconds"}
        spent = {what: sum(each[key] for each in plans.values()) for what, key in keys.items()}
        if any(spent.values()):
            lines.append("in all " + ", ".join(f"{what} {options.duration(value)}" for what, value in spent.items() if value))
        lines.append(f"disk {options.size(sum(each['disk_bytes'] for each in plans.values()))}, "
                     f"memory {options.size(max(each['memory_bytes'] for each in plans.values()))}")
        options.show({str(seed): each for seed, each in plans.items()}, lines, as_json=given["as_json"])
        return
    made = run_seeds(recipe, given["out"], count, quiet=given["quiet"], workers=given["workers"], executor=executor)
    _study(study(made), given)


def _study(found: Any, given: dict[str, Any]) -> None:
    from paft.compare import told, write
    from paft.report.seeds_tables import short_tables, tables

    rows = found.rows()
    out, store = given["out"], given["out"] if isinstance(given["out"], Store) else None
    data = write(found, store.here if store else out) if out else told(found, rows)
    for name in [f"compare.{kind}" for kind in ("md", "json", "csv", "html", "png")] + ["compare-ways.png"] * bool(data["ways"]):
        if store:
            store.push_file(name)
    if given["plot"]:
        from paft.report.plots import save
        from paft.report.trajectory import study_figure

        save(study_figure(rows, f"{data['name']}, mean of {len(found.runs)} seeds"), given["plot"])
    if given["html"]:
        from paft.report.page import study_page

        study_page(found, rows, given["html"], data["findings"])
    _show(data, (tables if given["markdown"] else short_tables)(found, rows), data["findings"], given)
    if given["out"] and not (given["as_json"] or given["markdown"]):
        click.echo(f"{given['out']}: compare.md, compare.json, compare.csv, compare.html,\n  compare.png"
                   + ", compare-ways.png" * bool(data["ways"]))


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
    _show(data, [("", rows, columns)], said, given)


def _show(data: dict[str, Any], tables: Sequence[Table], said: Sequence[str], given: dict[str, Any]) -> None:
    """JSON, Markdown or terminal tables on stdout, with the sentences below."""
    from paft.provenance import to_json
    from paft.report.render import escape, print_table, to_markdown

    if given["as_json"]:
        click.echo(to_json(data), nl=False)
        return
    if given["markdown"]:
        parts = [f"**{escape(title)}**\n\n" * bool(title) + to_markdown(rows, columns) for title, rows, columns in tables]
        click.echo("\n".join([*parts, *(f"- {escape(line)}" for line in said)]))
        return
    from rich.console import Console

    for title, rows, columns in tables:
        print_table(Console(highlight=False), rows, columns, title or None, legend=True)
        if any(column.help for column in columns):
            click.echo()
    click.echo("\n".join([*(textwrap.fill(line, 79, subsequent_indent="  ") for line in said)]))
    for what, name in (("plot", "figure"), ("html", "page")):
        if given[what]:
            click.echo(f"{name}: {given[what]}")
