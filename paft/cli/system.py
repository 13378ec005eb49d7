"""`paft run`, `paft recipes`, `paft verify`."""

from __future__ import annotations

import itertools
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import click

from paft.catalog import catalog, find, kind_of
from paft.cli import options
from paft.errors import MismatchError, NotFoundError
from paft.recipe import RunRecipe, load
from paft.store import Store, fetched

_LATER = {"merges": "merge_seconds", "evaluation": "evaluate_seconds"}
_SHOWN = 20  # differences, one a line


@click.command()
@click.argument("recipe")
@options.set_option("model=org/name or seed=1")
@options.out_option
@click.option("--resume", is_flag=True, help="Keep finished stages whose inputs have not changed.")
@click.option("--workers", type=click.IntRange(1), metavar="N",
              help="Trainings side by side  [default: one a GPU; on CPU 1, or one a core for a small base].")
@click.option("--share-base", is_flag=True, help="Train in turns over one copy of the base in memory; the results are the same.")
@options.executor
@options.dry_run
@options.overwrite
@options.common
def run(recipe: str, sets: tuple[str, ...], out: Path | Store | None, overwrite: bool, resume: bool, workers: int | None,
        share_base: bool, dry_run: bool, as_json: bool, quiet: bool, **rest: Any) -> None:
    """Run a pipeline: train, merge, evaluate, one table.

    RECIPE is `demo`, another recipe's name, or a path.

    \b
    paft run demo
    paft run paft --set model=org/name --set data.sft=chat.jsonl \\
        --set data.pref=pairs.jsonl
    paft run demo --set seed=1 -o merges/demo-1 --resume
    paft run paft -o /shared/paft --executor ray --address auto
    paft run paft -o s3://bucket/paft --resume
    """
    resolved = load(RunRecipe, find(recipe), sets)
    target = out or Path("merges") / resolved.name
    executor = options.executor_of({**rest, "quiet": quiet})

    from paft.models import quiet_libraries

    quiet_libraries()
    from paft import run as pipeline
    from paft.progress import say
    from paft.runstore import check_free

    if dry_run:
        if not resume:
            check_free(target, overwrite=overwrite)
        plan = pipeline.plan(resolved, target, workers=1 if share_base else workers, executor=executor)
        options.show(plan, _plan_lines(plan), as_json=as_json)
        return
    say(f"paft run {resolved.name}: {len(resolved.train)} adapters, {len(resolved.merge)} merges, base {resolved.model}, "
        f"into {target}", quiet=quiet)
    report = pipeline.run(resolved, target, overwrite=overwrite, resume=resume, quiet=quiet, workers=workers,
                          share_base=share_base, executor=executor)
    if as_json:
        options.show(report, [], as_json=True)
    else:
        _print_report(report, target)


def _print_report(report: dict[str, Any], out: Path | Store) -> None:
    from rich.console import Console

    from paft.report.headtohead import columns_of, task_columns
    from paft.report.render import print_table

    console = Console(highlight=False)
    columns = columns_of(report["rows"]) + task_columns(report["rows"])
    title = f"{report['name']}: {report['split']} split, seed {report['seed']}"
    print_table(console, report["rows"], columns, title, legend=True)
    click.echo("\n".join(["", *(textwrap.fill(line, 79, subsequent_indent="  ") for line in report["findings"]),
                          f"One seed: small differences are noise. `paft compare {report['name']}` runs five.", "",
                          f"{out}: report.md, report.json, tradeoff.png, sparsity.png,",
                          f"  adapters/, merges/  ({report['wall_s']:.0f} s)",
                          f"next: paft sparsity-report {out / 'adapters' / next(iter(report['adapters']))}",
                          "      paft recipes show paft    # the same on your own model and data"]))


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    lines = [f"would run {len(plan['train'])} trainings, {len(plan['merge'])} merges, {plan['evaluate']} evaluations",
             f"into {plan['out']}"]
    lines += [f"  train {stage['name']}" + (f" on {stage['on']}" if stage["on"] else "") + (" (kept)" if stage["done"] else "")
              for stage in plan["train"]]
    rows = ", ".join(f"{kind} {' / '.join(str(counts[split]) for split in ('train', 'validation', 'test'))}"
                     for kind, counts in plan["rows"].items())
    lines.append(f"rows (train / validation / test): {rows}")
    left = sum(not stage["done"] for stage in plan["train"])
    if left:
        side = f", {min(left, plan['workers'])} side by side" if min(left, plan["workers"]) > 1 else ""
        where = "this machine" if plan["executor"] == "local" else "nodes like this machine"
        lines.append(f"trainings: {options.duration(plan['seconds'])} on {where}{side}, "
                     f"{options.size(plan['memory_bytes'])} of memory")
    if asks := plan.get("asks"):
        alike: dict[str, list[str]] = {}
        for name, ask in asks.items():
            alike.setdefault(_asked(ask), []).append(name)
        said = [f"{'each stage' if len(alike) == 1 else ', '.join(names)}: {ask}" for ask, names in alike.items()]
        lines += options.hang([("on the cluster:", "; ".join(said))])
    if later := ", ".join(f"{what} {options.duration(plan[key])}" for what, key in _LATER.items() if plan[key]):
        lines.append(f"then {later}")
    lines += options.hang([("merges:", f"{', '.join(plan['merge'])}; about {options.size(plan['disk_bytes'])} of disk")])
    return lines


def _asked(ask: dict[str, float]) -> str:
    parts = [f"{ask[key]:g} {name}{'s' * (ask[key] != 1)}" for key, name in (("gpus", "GPU"), ("cpus", "CPU")) if ask[key]]
    return ", ".join(parts + [options.size(ask["memory"])] * bool(ask["memory"])) or "nothing"


@click.group()
def recipes() -> None:
    """List, show and copy the recipes that ship with paft."""


@recipes.command("ls")
@options.common
def recipes_ls(as_json: bool, **_: Any) -> None:
    """Every shipped recipe with its kind and what it is for."""
    rows = [{"name": name, "kind": kind_of(file), "about": _about(file)} for name, file in sorted(catalog().items())]
    options.show(rows, [*options.hang([(row["name"], row["kind"], row["about"]) for row in rows]),
                        "", "next: paft recipes show NAME, paft recipes cp NAME"], as_json=as_json)


def _about(file: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<=\.) |:(?= |$)", " ".join(line.strip("# ") for line in lines))[0].rstrip(".")


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print one recipe."""
    click.echo(find(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("cp")
@click.argument("name")
@click.argument("target", required=False, type=click.Path(path_type=Path))
def recipes_cp(name: str, target: Path | None) -> None:
    """Copy a recipe to TARGET (default: here) to edit it."""
    source = find(name)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise MismatchError(f"{target} exists", hint="name another file")
    if not target.parent.is_dir():
        raise NotFoundError(f"there is no directory {target.parent}")
    shutil.copyfile(source, target)
    click.echo(f"{target}\nnext: edit it, then paft {_verb(target)} {target}")


def _verb(file: Path) -> str:
    kind = kind_of(file)
    return kind if kind == "run" else f"{kind} -c"


@click.command()
@click.argument("directory", type=options.PLACE, metavar="DIR|URL")
@click.option("--against", multiple=True, metavar="DIR", type=click.Path(path_type=Path),
              help="A base or an adapter that it should be made from.")
@options.common
def verify(directory: Path | Store, against: tuple[Path, ...], as_json: bool, **_: Any) -> None:
    """Check an artefact, or a whole run, against paft.json.

    Hashes tensors and files again and names what differs: a tensor, a file, a
    stage, a base; exit code 3 if anything does.

    \b
    paft verify adapters/sft-l1
    paft verify merges/ties --against adapters/sft --against adapters/dpo
    """
    from paft.verify import verify_tree

    report = verify_tree(directory if isinstance(directory, Path) else fetched(directory.url), against)
    differences, count = report["differences"], report["artefacts"]
    lines = differences[:_SHOWN] + ([f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else [])
    several = f"{count} artefacts are" if count > 1 else "it is"
    options.show(report, lines or [f"{directory}: {several} what paft.json says"], as_json=as_json)
    if differences:
        raise MismatchError(f"{directory} is not what paft.json describes: {len(differences)} "
                            + ("difference" if len(differences) == 1 else "differences"), hint="make it again, or ask its author")
