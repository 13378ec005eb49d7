"""Generated answers of a candidate: AlpacaEval's file, a programmatic judge, a reward model. No judge is called unasked.

    FILE      [{"instruction", "output", "generator", "dataset"?}, ...]       what `alpaca_eval --model_outputs FILE` reads
    judge     f(answer, row) -> number, bool, or {name: number}               row: {"prompt", and "chosen", "rejected" if given}
    reward    r(prompt, answer), the one logit of a sequence classifier       as RewardBench and TRL's reward trainer use it

Means over the prompts, with the standard error s/√n beside (``_stderr``).
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paft import data, hub
from paft.data.sources import read
from paft.errors import MismatchError, NotFoundError, PaftError, UsageError
from paft.evaluate import Evaluator, Held
from paft.provenance import to_json
from paft.report.render import Column

TOKENS = 256  # of an answer, where nothing is said
Score = Callable[[str, data.Row], Any]


@dataclass
class Answers:
    """Answers to ``prompts`` (`load_prompts`), and what is made of them; call it with a model for a row of scores.

    Greedy, or drawn at ``temperature`` with ``seed``, the same draw for every candidate.
    """

    prompts: Sequence[data.Row]
    out: Path | None = None
    judge: tuple[str, Score] | None = None
    reward: Reward | None = None
    tokens: int = TOKENS
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    columns: list[Column] = field(default_factory=list)

    def __call__(self, name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Generate, write the candidate's file, and score; MismatchError where the judge fails."""
        import torch

        rows = [{**row, "prompt": _asked(row["prompt"], tokenizer)} for row in self.prompts]
        writer = Evaluator(tokenizer, Held([], [], []), batch_size=self.batch_size, generate=self.tokens)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            texts = writer.answers(model, rows, **sampling)
        if self.out is not None:
            write_alpaca(alpaca_file(self.out, name), name, self.prompts, texts)
        scores: dict[str, list[float]] = {}
        if self.judge is not None:
            scores |= _judged(*self.judge, name, texts, rows)
        if self.reward is not None:
            scores["reward"] = self.reward(texts, rows)
        told, known = f"mean over {len(texts)} generated answers", {column.key for column in self.columns}
        self.columns += [Column(key, key, ".3f", told) for key in scores if key not in known]
        return {key: value for one, values in scores.items() for key, value in _summary(one, values).items()}


class Reward:
    """A reward model of transformers (one label), by path or hub id, kept in memory beside the candidates."""

    def __init__(self, name: str, batch_size: int = 16) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from paft.data.template import check_template
        from paft.models import check_sizes, device

        path = hub.resolve(name, kind="reward model", patterns=hub.MODEL_FILES)
        self.batch_size = batch_size
        try:
            check_sizes(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            check_template(self.tokenizer, name)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise NotFoundError(f"cannot load the reward model {name}: {str(error).splitlines()[0]}") from error
        model, info = loaded
        if model.config.num_labels != 1 or info["missing_keys"]:
            raise MismatchError(f"{name} is no reward model: it has {model.config.num_labels} labels"
                                + (" and no trained head" if info["missing_keys"] else ""), hint="one label, one score")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"  # the head reads the last token that is no padding
        self.model = model.to(device()).eval()

    def __call__(self, texts: Sequence[str], rows: Sequence[data.Row]) -> list[float]:
        """The score of every answer after its prompt, as the reward model's own chat template writes them."""
        import torch

        whole = [self._text(row["prompt"], text) for text, row in zip(texts, rows, strict=True)]
        found: list[float] = []
        for start in range(0, len(whole), self.batch_size):
            coded = self.tokenizer(whole[start : start + self.batch_size], return_tensors="pt", padding=True, truncation=True,
                                   add_special_tokens=not self.tokenizer.chat_template)
            with torch.no_grad():
                logits = self.model(input_ids=coded["input_ids"].to(self.model.device),
                                    attention_mask=coded["attention_mask"].to(self.model.device)).logits
            found += logits[:, 0].float().tolist()
        return found

    def _text(self, prompt: Any, answer: str) -> str:
        if not self.tokenizer.chat_template:
            return f"{instruction_of(prompt)}\n\n{answer}"
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)


def load_prompts(source: str) -> list[data.Row]:
    """Rows with a ``prompt``: preference rows, instruction rows, or AlpacaEval's own (``instruction``, ``dataset``)."""
    first = next(iter(read(source, "test")), None)
    if first is not None and isinstance(first.get("instruction"), str):
        kept = ("dataset", "datasplit")
        return [{"prompt": row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else ""),
                 **{key: row[key] for key in kept if key in row}} for row in read(source, "test")]
    try:
        return data.load_rows(source, "pref", "test")
    except UsageError as error:
        try:
            rows = data.load_rows(source, "sft", "test")
        except UsageError:
            raise error from None
    if "prompt" not in rows[0]:
        raise UsageError(f"{source} holds no prompts, only text", hint="use preference rows, or rows with an instruction")
    return rows


def load_judge(name: str) -> tuple[str, Score]:
    """``MODULE:FUNCTION``, importable from here or from the current directory; UsageError where it is not."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"--judge {name!r} is not MODULE:FUNCTION", hint="for example --judge judges:politeness")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's runs when it is imported
        raise UsageError(f"--judge {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                         hint="f(answer, row) in a module that Python finds here") from error
    if not callable(found):
        raise UsageError(f"--judge {name} is no function")
    return name, found


def write_alpaca(file: Path, generator: str, rows: Sequence[data.Row], texts: Sequence[str]) -> None:
    """One generator's answers as AlpacaEval reads them."""
    kept = ("dataset", "datasplit")
    found = [{**{key: row[key] for key in kept if key in row}, "instruction": instruction_of(row["prompt"]), "output": text,
              "generator": generator} for row, text in zip(rows, texts, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(found), encoding="utf-8")


def alpaca_file(out: Path, name: str) -> Path:
    """The file of one candidate: AlpacaEval takes one generator a file, so its name goes before the suffix."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return out.with_name(f"{out.stem}-{slug}{out.suffix or '.json'}")


def instruction_of(prompt: Any) -> str:
    """A prompt as one text: the user's words, or all turns with their roles where there are several."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _asked(prompt: Any, tokenizer: Any) -> Any:
    """A plain instruction goes through the chat template where there is one."""
    chat = isinstance(prompt, str) and tokenizer.chat_template
    return [{"role": "user", "content": prompt}] if chat else prompt


def _judged(name: str, judge: Score, candidate: str, texts: Sequence[str], rows: Sequence[data.Row]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for place, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
        try:
            found = judge(text, row)
            named = found if isinstance(found, Mapping) else {name.partition(":")[2]: found}
            for key, value in named.items():
                scores.setdefault(str(key), []).append(float(value))
        except PaftError:
            raise
        except Exception as error:  # the user's own code
            raise MismatchError(f"the judge {name} failed on answer {place} of {candidate}: {type(error).__name__}: {error}",
                                hint="finished candidates are kept; f(answer, row) gives a number, or numbers by name") from error
    if any(len(values) != len(texts) for values in scores.values()):
        raise MismatchError(f"the judge {name} gave some answers of {candidate} a score that others lack: {', '.join(scores)}")
    return scores


def _summary(key: str, values: Sequence[float]) -> dict[str, float | None]:
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else None
    return {key: round(mean, 6), f"{key}_stderr": None if spread is None else round(spread / math.sqrt(len(values)), 6)}

