"""The head-to-head: trainings beside each other, or one pipeline over several seeds.

    trainings (`paft train-joint`, ...) ──> logs ──> trajectories, one table, costs          (`paft.report.trainings`)
    runs (`paft run`) or a recipe       ──> report.json of each seed ──> one table, intervals (`paft.report.seeds`)

What a directory is, its `paft.json` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paft.errors import NotFoundError, UsageError
from paft.provenance import MANIFEST, read_manifest
from paft.report.trainings import Group, grouped, read

RUN, TRAINING = "run", "training"


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
