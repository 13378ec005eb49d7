"""Rows as the trainer will see them: token ids and which of them are trained on, and what is wrong with that.

The ids and masks are TRL's own: its ``_prepare_dataset`` runs here on a few rows without a model. Preference rows give two
sequences, everything else one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from paft.data import Row
from paft.data.load import form
from paft.data.rows import Note, Stream, silent
from paft.data.template import check_template
from paft.errors import MismatchError, UsageError, first_line
from paft.jsonfile import read_json
from paft.models import resolve_base
from paft.recipe import TrainRecipe

SAMPLE = 100  # rows that are rendered to look for traps
MAX_LENGTH = 1024  # TRL's default, for every trainer


@dataclass(frozen=True)
class Sequence:
    """One rendered sequence: ``trained[i]`` says whether the loss counts token i; ``length`` is before the cut to max_length."""

    name: str
    ids: list[int]
    trained: list[bool]
    length: int


def render(tokenizer: Any, rows: list[Row], recipe: TrainRecipe) -> list[list[Sequence]]:
    """The sequences of each row by TRL's preparation, cut to ``trainer.max_length``; UsageError if the template refuses a row."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_trainer import SFTTrainer

    from paft.data import dataset

    options, pairs = recipe.trainer | getattr(recipe, "sft_trainer", {}), "chosen" in rows[0]
    args: Any = SimpleNamespace(dataset_num_proc=None, dataset_text_field="text", max_length=None, shuffle_dataset=False,
                                assistant_only_loss=bool(options.get("assistant_only_loss")) and form(rows[0]) == "messages")
    owner: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in rows[0])
    if options.get("completion_only_loss") is not None:
        owner.completion_only_loss = options["completion_only_loss"]
    if args.assistant_only_loss:
        owner.chat_template = training_template(tokenizer)
    plain: Any = dataset(list(rows))
    with template_errors():
        if pairs:
            prepared = DPOTrainer._prepare_dataset(owner, plain, tokenizer, args, "train")
        else:
            prepared = SFTTrainer._prepare_dataset(owner, plain, tokenizer, args, False, None, "train")
    limit = _limit(options)
    end = options.get("truncation_mode", DPOConfig.truncation_mode) == "keep_end"
    return [[_cut(sequence, limit, end) for sequence in _sequences(dict(row), pairs)] for row in prepared]


def _limit(options: dict[str, Any]) -> int | None:
    """Tokens that are kept of a row; packing other than ``bfd`` splits a long row and loses nothing."""
    splits = options.get("packing") and options.get("packing_strategy", "bfd") != "bfd"
    return None if splits else options.get("max_length", MAX_LENGTH)


def training_template(tokenizer: Any) -> str | None:
    """TRL's template that marks what the assistant says, where the tokenizer's own does not: for ``assistant_only_loss``."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)


def _sequences(row: Row, pairs: bool) -> list[Sequence]:
    if not pairs:
        ids, labels = row["input_ids"], row["labels"]
        return [Sequence("answer" if "prompt" in row else "text", ids, [label != -100 for label in labels], len(ids))]
    asked = row["prompt_ids"]
    return [Sequence(name, asked + row[f"{name}_ids"], [False] * len(asked) + [True] * len(row[f"{name}_ids"]),
                     len(asked) + len(row[f"{name}_ids"])) for name in ("chosen", "rejected")]


def _cut(sequence: Sequence, limit: int | None, end: bool) -> Sequence:
    part = slice(None) if limit is None else slice(-limit, None) if end else slice(limit)
    return Sequence(sequence.name, sequence.ids[part], sequence.trained[part], sequence.length)


@contextmanager
def template_errors() -> Iterator[None]:
    """What a chat template raises (turns that do not alternate, a system message it does not take) is about the data."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise UsageError(f"the chat template refuses a row: {first_line(error)}",
                         hint="correct the rows, or choose another template with --chat-template") from error


def check_rendering(tokenizer: Any, rows: dict[str, list[Row]], recipe: TrainRecipe, note: Note = silent) -> None:
    """Render up to `SAMPLE` rows of each set and look for what goes wrong without an error.

    MismatchError: a token that the model has no embedding for; nothing to train on. Told by ``note``: answers that no token ends
    which stops generation, a doubled or missing bos, rows that max_length cuts.
    """
    said: set[str] = set()
    for found in rows.values():
        if not found:
            continue
        step = max(1, len(found) // SAMPLE)
        check_template(tokenizer, str(recipe.chat_template or recipe.model), _conversations(found[::step][:SAMPLE]))
        rendered = render(tokenizer, found[::step][:SAMPLE], recipe)
        _check_ids(tokenizer, rendered, str(recipe.model))
        everything = len(rendered) == len(found) and not isinstance(found, Stream)
        for line in _traps(tokenizer, rendered, found[0], recipe, everything):
            if line not in said:
                said.add(line)
                note(line)


def _conversations(rows: list[Row]) -> list[Any]:
    """Every prompt with each of its answers, of rows that are messages."""
    chats = [row for row in rows if isinstance(row.get("prompt"), list)]
    return [row["prompt"] + row[answer] for row in chats for answer in ("completion", "chosen", "rejected")
            if isinstance(row.get(answer), list)]


def _check_ids(tokenizer: Any, rendered: list[list[Sequence]], model: str) -> None:
    config = read_json(resolve_base(model) / "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    highest = max([token for row in rendered for sequence in row for token in sequence.ids] + [tokenizer.pad_token_id])
    if size is not None and highest >= size:
        raise MismatchError(f"the tokenizer makes token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), and the model "
                            f"has only {size}", hint="the tokenizer is not this model's, or tokens were added to it alone")


def _traps(tokenizer: Any, rendered: list[list[Sequence]], first: Row, recipe: TrainRecipe, everything: bool) -> Iterator[str]:
    limit, of = _limit(recipe.trainer), f"of {len(rendered)} rows looked at"
    lost = sum(any(not any(each.trained) for each in row) for row in rendered)
    if lost == len(rendered) and everything:
        raise MismatchError(f"no row is left to train on: the prompt alone fills max_length={limit}",
                            hint="raise trainer.max_length")
    if lost:
        yield f"{lost} {of} lose their whole answer: the prompt alone fills max_length={limit}"
    cut = sum(any(len(each.ids) < each.length for each in row) for row in rendered) - lost
    if cut > 0:
        yield f"{cut} {of} are longer than max_length={limit} and lose the end of the answer"
    whole = [each for row in rendered for each in row if len(each.ids) == each.length]
    stops = _stops(tokenizer, str(recipe.model))
    if whole and not any(token in stops for each in whole for token, on in zip(each.ids, each.trained, strict=True) if on):
        yield (f"no answer ends in a token that stops generation ({', '.join(map(tokenizer.decode, sorted(stops)))}): the model "
               "will not learn to stop; correct the chat template")
    tokens = [token for each in whole for token in each.ids]
    if (unknown := tokens.count(tokenizer.unk_token_id)) > len(tokens) / 100:
        yield f"{unknown / len(tokens):.0%} of the tokens are {tokenizer.unk_token}: this tokenizer does not know the words"
    bos = tokenizer.bos_token_id
    if bos is not None and any(each.ids[:2] == [bos, bos] for each in whole):
        yield f"sequences begin with {tokenizer.bos_token} twice: remove it from the rows or the template"
    if bos is not None and whole and form(first) == "messages" and tokenizer("a")["input_ids"][0] == bos != whole[0].ids[0]:
        yield f"the chat template does not begin with {tokenizer.bos_token}, which plain text of this model does"


def _stops(tokenizer: Any, model: str) -> set[int]:
    """Tokens that end generation: the tokenizer's eos and those of the model's generation config."""
    file = resolve_base(model) / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    return {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
