"""Score any models and adapters side by side: what `paft eval` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paft import data, hub
from paft.adapter import PATTERNS
from paft.errors import MismatchError, UsageError
from paft.evaluate import Evaluator, Held, judge_of
from paft.models import load_model, load_tokenizer, wrap
from paft.progress import Progress


def score(names: list[str], *, base: str | None, sft_data: str | None, pref_data: str | None, text: str | None, beta: float,
          generate: int, rows: int | None, batch_size: int, quiet: bool = False) -> list[dict[str, Any]]:
    """One row of metrics (`paft.evaluate`) for the base and each candidate, in order.

    ``base`` None is what the first adapter names. Preference metrics need it as their reference: UsageError without one.
    """
    adapters = {name: _adapter_base(name) for name in names}
    base = base or next((found for found in adapters.values() if found), None)
    if base is None and (pref_data or any(found is not None for found in adapters.values())):
        raise UsageError("no base given, and no adapter names one", hint="pass --base MODEL")
    held = Held(*(data.load_rows(source, role) if source else [] for source, role in  # type: ignore[arg-type]
                  ((sft_data, "sft"), (pref_data, "pref"), (text, "text")))).head(rows)
    chat = any(isinstance(row.get("prompt"), list) for row in held.sft[:1] + held.pref[:1])
    template = _template([name for name in names if adapters[name] is not None])
    scorer = Evaluator(load_tokenizer(base or names[0], chat=chat, template=template), held, None, beta, batch_size, generate,
                       judge_of(pref_data))
    found: list[dict[str, Any]] = []
    with Progress("evaluate", len(names) + bool(base), quiet=quiet) as show:
        if base:
            model = load_model(base)
            scorer = scorer.against(model) if held.pref else scorer
            found.append({"name": base, **scorer(model)})
            show(len(found), base)
        for name in names:
            model = wrap(load_model(str(base)), name) if adapters[name] is not None else load_model(name)
            found.append({"name": name, **scorer(model)})
            show(len(found), name)
    return found


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
    read = json.loads(Path(config).read_text())
    revision = read.get("revision")
    return (read.get("base_model_name_or_path") or "") + (f"@{revision}" if revision else "")
