"""The head-to-head: trainings beside each other, or one pipeline over several seeds.

    trainings (`paft train-joint`, ...) ──> logs ──> trajectories, one table, costs          (`paft.report.trainings`)
    runs (`paft run`) or a recipe       ──> report.json of each seed ──> one table, intervals (`paft.report.seeds`)

What a directory is, its `paft.json` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft.errors import NotFoundError, UsageError
from paft.executor import LOCAL, Ask, Executor
from paft.progress import say
from paft.provenance import MANIFEST, read_manifest, to_json
from paft.report.paired import mean_error
from paft.report.render import escape, to_markdown
from paft.report.seeds import Row, Study
from paft.report.seeds_tables import findings, tables, to_csv
from paft.report.trainings import COST, Group, grouped, read
from paft.report.ways import ways
from paft.store import Store

if TYPE_CHECKING:
    from paft.recipe import RunRecipe

RUN, TRAINING = "run", "training"
SCHEMA = 1


def kind_of(directory: Path) -> str:
    """``run`` or ``training``, by the command that made it; NotFoundError for neither, UsageError for another artefact."""
    manifest = read_manifest(directory)
    if manifest is None:
        if directory.with_name(directory.name + ".partial").is_dir():
            raise NotFoundError(f"{directory} is not finished", hint="the same command with --resume finishes it")
        raise NotFoundError(f"{directory} has no {MANIFEST}: neither a training nor a run of paft",
                            hint="name what `paft train-joint` or `paft run` has made")
    command = str(manifest.get("command"))
    if command != "run" and not command.startswith("train-"):
        raise UsageError(f"{directory} was made by `paft {command}`, which has no log of evaluations",
                         hint="`paft eval` scores models and adapters")
    return RUN if command == "run" else TRAINING


def trainings(directories: Sequence[Path]) -> list[Group]:
    """Trainings as groups that differ in the seed alone."""
    return grouped([read(directory) for directory in directories])


def run_seeds(recipe: RunRecipe, out: Path | Store, count: int, *, quiet: bool = False, workers: int | None = None,
              executor: Executor = LOCAL) -> list[Path]:
    """Run ``recipe`` with ``count`` seeds from its own on, under ``out``/seed-K; finished stages of the same content are kept.

    On Ray the seeds run at once, each as a task that takes no core and waits for those of its stages. Returns where the runs are
    on this machine.
    """
    from paft.run import run

    found = places(recipe, out, count)
    if executor.spreads:
        seeds = {f"seed-{seed}": seed for seed in found}
        work = partial(_run_seed, recipe, out, seeds, workers, replace(executor, address=None, quiet=False))
        executor.graph(dict.fromkeys(seeds), work, workers=0, room=out, asks=dict.fromkeys(seeds, Ask(cpus=0)),
                       done=lambda name, _: say(f"{name} done", quiet=quiet))
        return [_tables(place) for place in found.values()]
    for number, (seed, place) in enumerate(found.items(), 1):
        say(f"seed {seed} ({number}/{count}) into {place}", quiet=quiet)
        run(recipe.model_copy(update={"seed": seed}), place, resume=True, quiet=quiet, workers=workers)
    return [place.here if isinstance(place, Store) else place for place in found.values()]


def _run_seed(recipe: RunRecipe, out: Path | Store, seeds: dict[str, int], workers: int | None, executor: Executor,
              name: str) -> None:
    from paft.run import run

    run(recipe.model_copy(update={"seed": seeds[name]}), out / name, resume=True, workers=workers, executor=executor)


def _tables(place: Path | Store) -> Path:
    """A run that was made elsewhere, as far as a comparison reads it."""
    from paft.runstore import fetch_tables

    if isinstance(place, Store):
        fetch_tables(place)
        return place.here
    return place


def places(recipe: RunRecipe, out: Path | Store, count: int) -> dict[int, Path | Store]:
    """seed -> where its run is."""
    return {seed: out / f"seed-{seed}" for seed in range(recipe.seed, recipe.seed + count)}


def write(found: Study, out: Path) -> dict[str, Any]:
    """compare.json, .md, .csv, .html and the figures of a study into ``out``; returns what compare.json holds."""
    from paft.report.page import study_page
    from paft.report.plots import save
    from paft.report.trajectory import study_figure, ways_figure

    rows = found.rows()
    data = told(found, rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(to_json(data), encoding="utf-8")
    (out / "compare.csv").write_text(to_csv(rows), encoding="utf-8")
    parts = [f"# {escape(data['name'])}: seeds {', '.join(map(str, found.seeds))}",
             "\n".join(f"- {escape(line)}" for line in data["findings"]),
             *(f"## {escape(title)}\n\n{to_markdown(shown, columns)}" for title, shown, columns in tables(found, rows))]
    (out / "compare.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    title = f"{data['name']}, mean of {len(found.runs)} seeds"
    save(study_figure(rows, title), out / "compare.png")
    if gone := ways(found):
        save(ways_figure(rows, gone, title), out / "compare-ways.png")
    study_page(found, rows, out / "compare.html", data["findings"])
    return data


def told(found: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """A study as JSON."""
    stages = {name: {key: mean_error([run.costs[name][key] for run in found.runs])[0] for key in COST
                     if all(key in run.costs[name] for run in found.runs)} for name in found.recipe.get("train", {})}
    return {"kind": "study", "schema": SCHEMA, "name": str(found.recipe.get("name")), "model": found.recipe.get("model"),
            "seeds": found.seeds, "directories": [str(run.path) for run in found.runs], "baselines": found.baselines(),
            "rows": rows, "stages": stages, "ways": [way.to_dict() for way in ways(found)], "findings": findings(found, rows)}
