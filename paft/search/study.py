"""The Optuna study of a search: a sampler that continues as it would have gone on, a file that processes share, the loop.

    minimise (f_SFT, f_DPO)(recipe)      multi-objective TPE (Ozaki et al., GECCO 2020), after anchors and random trials

TPE rather than NSGA-II: a search has some hundred trials of seconds each, and numbers that depend on the method; a generation of
NSGA-II is 50 trials by default, while TPE models each number from the first dozen on and counts what other processes have at
work (constant liar). Two demo adapters with two layer groups, 60 trials, two seeds, hypervolume below (3, 2) nats: TPE 3.47 and
3.58, multivariate TPE 3.49 and 3.40, NSGA-II with a population of 12 3.52 and 3.27, random 3.32 and 3.24.

Every trial draws from a sampler of its own, seeded by (seed, number of trials before it that did not fail), so a study in one
process that was interrupted and resumed has the trials of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from paft.errors import MismatchError, PaftError, UsageError
from paft.progress import Progress

NAME = "paft search"
DIRECTIONS = ("minimize", "minimize")
SUFFIXES = (".db", ".journal")
ANOTHER = "name another --study FILE, or another -o URL"


class Seeded(BaseSampler):
    """``anchors`` first, then TPE; what a trial draws depends on the seed and on the finished trials alone."""

    def __init__(self, seed: int, anchors: list[dict[str, Any]]) -> None:
        self.seed, self.anchors = seed, anchors
        self._anchor: dict[str, Any] = {}
        self._tpe: BaseSampler = TPESampler(seed=seed)

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        before = [one for one in study.get_trials(deepcopy=False) if one.number < trial.number]
        slot = sum(one.state != TrialState.FAIL for one in before)
        self._anchor = self.anchors[slot] if slot < len(self.anchors) else {}
        digest = hashlib.sha256(f"{self.seed}\0{slot}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._tpe = TPESampler(seed=int.from_bytes(digest[:4], "little"), constant_liar=True,
                                   n_startup_trials=max(10, 2 * len(self.anchors)))

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        return {} if self._anchor else self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return {} if self._anchor else self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        if param_name in self._anchor:
            return self._anchor[param_name]
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Any, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._tpe.after_trial(study, trial, state, values)


def open_study(place: Path | BaseJournalBackend, sampler: BaseSampler, about: Mapping[str, Any], *, resume: bool,
               name: str = "") -> Any:
    """The study in a file (SQLite ``.db``, or ``.journal``, which also works over NFS) or a journal, made where there is none.

    ``about`` says what is searched, ``name`` what an error calls the place. Raises UsageError for another suffix, MismatchError
    where the file is there and not ``resume``, is no study, or is one about something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name = name or str(place)
    if isinstance(place, Path):
        if place.suffix not in SUFFIXES:
            raise UsageError(f"{name} is no study's name", hint="end it in .db (SQLite), or in .journal (for a network disk)")
        if place.exists() and not resume:
            raise MismatchError(f"{name} exists", hint="--resume continues or joins it; or name another --study FILE")
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = _opened(place, sampler)
        known = study.user_attrs.get("about")
    except PaftError:
        raise
    except Exception as error:  # SQLAlchemy's, alembic's, json's: whatever another program's file causes
        raise MismatchError(f"{name} is no study of paft: {type(error).__name__}", hint=ANOTHER) from error
    told = json.loads(json.dumps(about))
    if known is None:
        study.set_user_attr("about", told)
    elif known != told:
        other = ", ".join(key for key in told if known.get(key) != told[key])
        raise MismatchError(f"{name} is a study with another {other}", hint=ANOTHER)
    return study


def _opened(place: Path | BaseJournalBackend, sampler: Any) -> Any:
    """The study; two processes that make its tables at once get in each other's way, and the later one tries again."""
    for wait in (0.2, 0.5, 1.0, 2.0, None):
        try:
            return optuna.create_study(storage=_storage(place), sampler=sampler, study_name=NAME, directions=list(DIRECTIONS),
                                       load_if_exists=True)
        except Exception as error:
            if wait is None or type(error).__name__ not in ("OperationalError", "IntegrityError"):
                raise
            time.sleep(wait)
    raise AssertionError


def _storage(place: Path | BaseJournalBackend) -> Any:
    if isinstance(place, Path) and place.suffix == ".db":
        # Several processes write in turn; SQLite's own patience of 5 s is short for a slow disk.
        return optuna.storages.RDBStorage(f"sqlite:///{place}", engine_kwargs={"connect_args": {"timeout": 60}})
    return optuna.storages.JournalStorage(JournalFileBackend(str(place)) if isinstance(place, Path) else place)


def complete(study: Any) -> list[FrozenTrial]:
    """The finished trials, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def run_trials(study: Any, trials: int, objective: Callable[[Any], tuple[float, float]], *, quiet: bool = False) -> None:
    """Go on until the study has ``trials`` finished ones, of whatever process. Ctrl-C keeps them.

    Raises MismatchError for a loss that is no number; the trial then counts as failed.
    """
    before = len(complete(study))

    def checked(trial: Any) -> tuple[float, float]:
        found = objective(trial)
        if not all(map(math.isfinite, found)):
            raise MismatchError(f"a candidate's losses are {found[0]:g} and {found[1]:g}", hint="narrow the --range of weight")
        return found

    with Progress("search", trials, before=before, quiet=quiet) as show:
        show(before)
        while (done := len(complete(study))) < trials:
            study.optimize(checked, n_trials=1)
            show(done + 1, f"{len(study.best_trials)} on the front")
