"""Score any models, adapters and merges side by side: what `paft eval` does.

The base is in memory once: adapters are attached to it and taken off again, merges are applied to it and undone
(`paft.merge.resident`); only a whole model is loaded beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from paft import data, hub
from paft.adapter import PATTERNS
from paft.errors import MismatchError, UsageError
from paft.evaluate import Evaluator, Held, judge_of
from paft.jsonfile import read_json
from paft.merge.job import Job
from paft.merge.resident import Resident, open_job
from paft.models import check_load, device, load_model, load_tokenizer, resolve_base, wrap
from paft.progress import Progress
from paft.recipe import MergeRecipe

Row = dict[str, Any]
Measure = Callable[[str, Any, Any], Row]  # (candidate's name, model, tokenizer) -> further columns


def score(names: Sequence[str], *, base: str | None, sft_data: str | None, pref_data: str | None, text: str | None, beta: float,
          generate: int, rows: int | None, batch_size: int, merges: Mapping[str, MergeRecipe] | None = None,
          measures: Sequence[Measure] = (), chat: bool = False, done: Callable[[Row], None] | None = None,
          quiet: bool = False) -> list[Row]:
    """One row of metrics (`paft.evaluate`) for the base and each candidate, in order; ``merges`` by name come last.

    ``base`` None is what the first adapter names. Preference metrics need it as their reference: UsageError without one.
    ``measures`` add columns (`paft.tasks`, `paft.answers`); ``done`` gets every row as soon as it is there. ``chat``: the base
    must have a chat template.
    """
    adapters = {name: _adapter_base(name) for name in names}
    base = base or next((found for found in adapters.values() if found), None)
    jobs = {name: open_job(recipe, base=base, device=device()) for name, recipe in (merges or {}).items()}
    base = base or next((job.inputs.reference for job in jobs.values()), None)
    if base is None and (pref_data or any(found is not None for found in adapters.values())):
        raise UsageError("no base given, and no adapter names one", hint="pass --base MODEL")
    held = Held(*(data.load_rows(source, role) if source else [] for source, role in  # type: ignore[arg-type]
                  ((sft_data, "sft"), (pref_data, "pref"), (text, "text")))).head(rows)
    chat = chat or any(isinstance(row.get("prompt"), list) for row in held.sft[:1] + held.pref[:1])
    template = _template([name for name in names if adapters[name] is not None] + [
        str(one.path) for job in jobs.values() for one in job.inputs.adapters])
    scorer = Evaluator(load_tokenizer(base or names[0], chat=chat, template=template), held, None, beta, batch_size, generate,
                       judge_of(pref_data))
    for path in [None, *(resolve_base(name) for name in names if adapters[name] is None)]:  # the largest pair, before any work
        check_load(*[each for each in (resolve_base(base) if base else None, path) if each])
    found: list[Row] = []
    with Progress("evaluate", len(names) + len(jobs) + bool(base), quiet=quiet) as show:
        model = load_model(base) if base else None
        scorer = scorer.against(model) if model is not None and held.pref else scorer
        loading = [*([(base, nullcontext(model))] if base else []),
                   *((name, _whole(name) if adapters[name] is None else attached(model, name)) for name in names),
                   *((name, _merged(model, job)) for name, job in jobs.items())]
        for name, candidate in loading:
            with candidate as one:
                row = {"name": name, **scorer(one)}
                for measure in measures:
                    row |= measure(name, one, scorer.tokenizer)
            found.append(row)
            if done is not None:
                done(row)
            show(len(found), name)
    return found


@contextmanager
def _whole(name: str) -> Iterator[Any]:
    yield load_model(name)


def _merged(base: Any, job: Job) -> AbstractContextManager[Any]:
    return Resident(base, job.inputs.base).merged(job)


@contextmanager
def attached(model: Any, adapter: str) -> Iterator[Any]:
    """``model`` with an adapter on it (`paft.models.wrap`), taken off again at the end: the model is then as it was.

    PEFT's ``unload`` alone leaves the adapter's copies of ``modules_to_save`` in place of the model's own modules.
    """
    modules = dict(model.named_modules())
    wrapped = wrap(model, adapter)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        vars(model).pop("peft_config", None)  # older PEFT leaves it, and warns of it at the next adapter
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            if name and getattr(modules[parent], leaf) is not module:
                setattr(modules[parent], leaf, module)


def _template(adapters: list[str]) -> str | None:
    """The chat template that came with the adapters, where one was chosen for them; MismatchError if they disagree."""
    files = {name: hub.resolve(name, kind="adapter", patterns=[*PATTERNS, *hub.MODEL_FILES]) / "chat_template.jinja"
             for name in adapters}
    texts = {file.read_text(encoding="utf-8"): (name, file) for name, file in files.items() if file.is_file()}
    if len(texts) > 1:
        raise MismatchError("adapters have different chat templates: " + ", ".join(name for name, _ in texts.values()),
                            hint="score them apart")
    return next((str(file) for _, file in texts.values()), None)


def _adapter_base(name: str) -> str | None:
    """The base that an adapter names ("" if none), or None for a whole model."""
    config = hub.resolve(name, kind="model or adapter", patterns=[*PATTERNS, *hub.MODEL_FILES]) / "adapter_config.json"
    if not config.is_file():
        return None
    read = read_json(config)
    named, revision = read.get("base_model_name_or_path"), read.get("revision")
    if not all(each is None or isinstance(each, str) for each in (named, revision)):
        raise MismatchError(f"{config}: base_model_name_or_path and revision should be names")
    return (named or "") + (f"@{revision}" if revision else "")
