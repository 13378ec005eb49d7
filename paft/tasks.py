"""Named tasks of lm-evaluation-harness on models in memory: columns of the table of `paft eval`.

    leaderboard-v1   arc_challenge 25, hellaswag 10, mmlu 5, truthfulqa_mc2 0, winogrande 5, gsm8k 5     shots; the PAFT paper's
    leaderboard-v2   bbh 3, gpqa 0, mmlu_pro 5, musr 0, ifeval 0, math_hard 4                           UFT's second table
    any other name   the harness's, or that of a YAML file in ``path``, with its own shots unless told otherwise

One metric of a task is its column (a preset's own, else acc_norm, else the first); all of them are under ``tasks`` of the row.
The tasks are loaded once, before any model, so that one without data is refused in time. Harness: Gao et al. (2023), lm-eval.
A model is handed over as it is (`HFLM(pretrained=model)`), so nothing is written or loaded again for a candidate.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError, UsageError, did_you_mean, first_line
from paft.report.render import Column

SEED = 1234  # the harness's own, for the draw of the shots


@dataclass(frozen=True)
class Named:
    """One task: how many shots (None: as the task says), and which metric is its column (None: see above)."""

    name: str
    shots: int | None = None
    metric: str | None = None


PRESETS = {
    "leaderboard-v1": (Named("arc_challenge", 25, "acc_norm"), Named("hellaswag", 10, "acc_norm"), Named("mmlu", 5, "acc"),
                       Named("truthfulqa_mc2", 0, "acc"), Named("winogrande", 5, "acc"), Named("gsm8k", 5, "exact_match")),
    "leaderboard-v2": (Named("leaderboard_bbh", 3, "acc_norm"), Named("leaderboard_gpqa", 0, "acc_norm"),
                       Named("leaderboard_mmlu_pro", 5, "acc"), Named("leaderboard_musr", 0, "acc_norm"),
                       Named("leaderboard_ifeval", 0, "inst_level_strict_acc"), Named("leaderboard_math_hard", 4, "exact_match")),
}


def expand(names: Sequence[str], shots: int | None = None) -> list[Named]:
    """The tasks that ``names`` (tasks or presets) stand for, each once; ``shots`` goes before what they say."""
    found: dict[str, Named] = {}
    for name in names:
        for task in PRESETS.get(name, (Named(name),)):
            found[task.name] = task if shots is None else Named(task.name, shots, task.metric)
    return list(found.values())


class Harness:
    """Tasks with their data, loaded; call it with a model for a row of scores.

    ``limit``: only the first rows of every task. ``path``: a directory of the user's own task files. ``chat``: prompts go through
    the tokenizer's chat template. Raises ResourceError without the harness, UsageError for an unknown task or a wrong file,
    NotFoundError for a task whose data cannot be read here.
    """

    def __init__(self, names: Sequence[str], *, shots: int | None = None, limit: int | None = None, path: Path | None = None,
                 chat: bool = False, batch_size: int = 16) -> None:
        self.limit, self.chat, self.batch_size = limit, chat, batch_size
        manager = _manager(path, [task.name for task in expand(names)])
        self.tasks = [(task, _load(manager, task)) for task in expand(names, shots)]

    @property
    def columns(self) -> list[Column]:
        """One column a task, in the order asked for."""
        return [Column(task.name, task.name, ".3f", f"lm-eval, {_told(task)}") for task, _ in self.tasks]

    @property
    def contents(self) -> dict[str, str]:
        """task -> hash of all that its scores depend on beside the model: configuration, rows, shots, limit, harness."""
        from lm_eval import __version__ as version

        asked = [version, SEED, self.limit, self.chat]
        return {task.name: _hash([asked, task.metric, loaded.get("groups"), [_content(one, self.limit) for one in
                                                                             loaded["tasks"].values()]])
                for task, loaded in self.tasks}

    def work(self, tokenizer: Any) -> tuple[float, float]:
        """About how many tokens all tasks make a model read, and how many to write, of prompts as the first rows have them."""
        found = []
        for task, loaded in self.tasks:
            with _silence(), _blamed(task.name, "its first rows"):
                found += [_work(one, tokenizer, self.limit) for one in loaded["tasks"].values()]
        return sum(read for read, _ in found), sum(written for _, written in found)

    def __call__(self, name: str, model: Any, tokenizer: Any, only: str | None = None) -> dict[str, Any]:
        """``{task: value, task_stderr: value, ..., "tasks": {task: all metrics}}`` of a model, or of the ``only`` task of it.

        ``name`` is for errors.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        row: dict[str, Any] = {"tasks": {}}
        with _silence():
            wrapped: Any = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
            for task, loaded in (each for each in self.tasks if only in (None, each[0].name)):
                with _blamed(task.name, name):
                    found = evaluate(wrapped, loaded, limit=self.limit, bootstrap_iters=1000, log_samples=False,
                                     apply_chat_template=self.chat, fewshot_as_multiturn=self.chat)
                row["tasks"][task.name] = told = _metrics(found, task.name)
                chosen = _chosen(told, task.metric)
                row[task.name], row[f"{task.name}_stderr"] = told[chosen], told.get(f"{chosen}_stderr")
                told["metric"] = chosen
        return row


def _manager(path: Path | None, names: Sequence[str]) -> Any:
    """The harness's index of tasks; its own thousands are left out where the user's directory has all that is asked for."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ResourceError("named tasks need lm-evaluation-harness", hint="pip install 'paft[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if path is not None and not path.is_dir():
        raise NotFoundError(f"no directory {path}", hint="name the directory of your task files")
    own = TaskManager(include_path=str(path), include_defaults=False) if path else None
    if own is not None and set(names) <= set(own.all_tasks):
        return own
    manager = TaskManager(include_path=str(path) if path else None)
    for name in names:
        if name not in manager.all_tasks:
            close = did_you_mean(name, [*manager.all_tasks, *PRESETS])
            raise UsageError(f"there is no task {name!r}", hint=close if close.startswith("did") else "lm-eval ls tasks")
    return manager


def _load(manager: Any, task: Named) -> Any:
    """One task or group with its data and shots."""
    try:
        with _silence():
            loaded = manager.load([task.name])
            for one in loaded["tasks"].values():
                wanted, own = task.shots, one.get_config("num_fewshot")
                if own is None or (wanted is not None and own != 0):  # a task that says 0 shots has none to give
                    one.set_config(key="num_fewshot", value=wanted or 0)
                one.set_fewshot_seed(seed=SEED)
    except Exception as error:  # the harness, `datasets` and the task's own code raise what they like
        raise _refused(task.name, error) from error
    return loaded


HEAD = 8  # rows of a task by which its work is judged


def _content(task: Any, limit: int | None) -> list[Any]:
    """A task's configuration without the places of its files, and the rows that it reads."""
    config = {key: value for key, value in task.dump_config().items() if key not in ("dataset_path", "dataset_kwargs")}
    shown = list(task.fewshot_docs()) if task.get_config("num_fewshot") else []
    return [config, list(islice(iter(task.eval_docs), limit)), shown]


def _hash(content: Any) -> str:
    """sha256 of data with functions in it, which count by their source or name, and not by their address."""
    text = json.dumps(content, sort_keys=True, default=lambda value: getattr(value, "__dict__", None) or repr(value))
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


def _work(task: Any, tokenizer: Any, limit: int | None) -> tuple[float, float]:
    docs = len(task.eval_docs)
    head, asked = min(HEAD, limit or docs, docs), min(limit or docs, docs)
    task.build_all_requests(limit=head)
    read = written = 0
    for one in task.instances:
        texts = [str(part) for part in one.args if isinstance(part, str)]
        read += len(tokenizer("".join(texts))["input_ids"])
        written += sum(part.get("max_gen_toks", 256) for part in one.args if isinstance(part, Mapping))
    return read * asked / head, written * asked / head


def _refused(name: str, error: Exception) -> PaftError:
    if isinstance(error, ImportError):
        return ResourceError(f"task {name} needs a package that is not installed: {first_line(error)}",
                             hint="pip install 'lm-eval[math,ifeval]'")
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    if any(isinstance(one, OSError) for one in chain):  # ConnectionError and FileNotFoundError are
        return NotFoundError(f"the data of task {name} cannot be read: {first_line(error)}",
                             hint="the hub must be reachable, or the data local, with a task file of your own")
    return UsageError(f"task {name} cannot be loaded: {first_line(error)}", hint="`lm-eval validate` checks a task file")


def _metrics(found: Any, name: str) -> dict[str, Any]:
    """``{metric: value, metric_stderr: value}`` of a task or group; several filters of a metric are ``metric,filter``."""
    raw = (found.get("groups") or {}).get(name) or found["results"].get(name) or {}
    keys = [key for key in raw if "," in key and "_stderr," not in key and isinstance(raw[key], int | float)]
    told: dict[str, Any] = {}
    for key in keys:
        metric, _, filtered = key.partition(",")
        label = metric if sum(other.partition(",")[0] == metric for other in keys) == 1 else key
        told[label] = float(raw[key])
        error = raw.get(f"{metric}_stderr,{filtered}")
        told[f"{label}_stderr"] = float(error) if isinstance(error, int | float) else None
    if not told:
        raise MismatchError(f"task {name} gave no number")
    counted = found.get("n-samples", {})
    return {**told, "rows": sum(one["effective"] for one in counted.values()), "shots": found.get("n-shot", {}).get(name)}


def _chosen(told: Mapping[str, Any], metric: str | None) -> str:
    names = [key for key in told if not key.endswith("_stderr") and key not in ("rows", "shots")]
    for wanted in (metric, "acc_norm"):
        for name in names:
            if wanted is not None and name.partition(",")[0] == wanted:
                return name
    return names[0]


def _told(task: Named) -> str:
    return ", ".join(filter(None, [task.metric, None if task.shots is None else f"{task.shots} shots"])) or "as the task says"


@contextlib.contextmanager
def _blamed(task: str, name: str) -> Iterator[None]:
    """MismatchError for what a task's templates and code raise on its rows."""
    from jinja2 import TemplateError

    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError, TemplateError) as error:
        raise MismatchError(f"task {task} on {name}: {first_line(error)}") from error


@contextlib.contextmanager
def _silence() -> Any:
    """No bars and warnings of the harness, which writes them whatever it is told; errors are raised."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
