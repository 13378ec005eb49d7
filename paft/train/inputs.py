"""What a training stage trains on: the recipe's data read and checked, and the tokenizer that renders it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from paft.data import Reading, Role, Row, Stream, check_leakage, hold_out, load_rows, open_stream
from paft.errors import MismatchError, UsageError
from paft.models import load_tokenizer
from paft.progress import say
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe, Sources, TrainRecipe
from paft.tokens import boundary_moves
from paft.train import losses
from paft.train.heldout import check_pairs
from paft.train.methods import trainer_of
from paft.train.rendering import check_rendering

AnyRecipe = SftRecipe | DpoRecipe | JointRecipe
Rows = dict[str, list[Row]]
T = TypeVar("T")


def load(recipe: AnyRecipe, quiet: bool = False) -> Rows:
    """Read and check the recipe's data: train and eval rows; of a joint recipe sft, sft_eval, pref and pref_eval rows."""
    how = Reading(on_bad_row=recipe.on_bad_row, seed=recipe.seed, note=lambda line: say(f"note: {line}", quiet=quiet))
    if isinstance(recipe, JointRecipe):
        sft, sft_held = _read(recipe, "sft", require(recipe.sft_data, "--sft-data"), recipe.sft_eval_data,
                              replace(how, columns=recipe.sft_columns))
        pref, pref_held = _read(recipe, trainer_of(recipe).ROLE, require(recipe.pref_data, "--pref-data"), recipe.pref_eval_data,
                                replace(how, columns=recipe.pref_columns), eval_role="pref")
        if bool(sft_held) != bool(pref_held):
            missing = "sft" if pref_held else "pref"
            raise UsageError("an evaluation measures both objectives, and held-out rows are given for one",
                             hint=f"pass --{missing}-eval-data too, or --eval-fraction for both")
        check_pairs(pref_held)
        return {"sft": sft, "pref": _alike(recipe, pref), "sft_eval": sft_held, "pref_eval": pref_held}
    role = losses.role(recipe) if isinstance(recipe, DpoRecipe) else "sft"
    train, held = _read(recipe, role, require(recipe.data, "--data"), recipe.eval_data, replace(how, columns=recipe.columns))
    return {"train": train, "eval": held}


def _alike(recipe: JointRecipe, feedback: list[Row]) -> list[Row]:
    """UFT's feedback as rows of one kind, as TRL's preparation wants them: pairs beside labels or scores are taken apart."""
    if isinstance(feedback, Stream) or all("chosen" in row for row in feedback):
        return feedback
    if recipe.estimate_optima:
        raise UsageError("--estimate-optima trains DPO alone, which takes pairs, and the feedback has labels or scores",
                         hint="pass --sft-opt and --dpo-opt instead")
    apart = (each for row in feedback for each in ([row] if "label" in row else losses.unpair([row])))
    return [each | {"label": float(each["label"])} for each in apart]


def _read(recipe: TrainRecipe, role: Role, source: Sources, eval_source: Sources | None,
          how: Reading, eval_role: Role | None = None) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows) of one data set."""
    held = load_rows(eval_source, eval_role or role, how=how) if eval_source else []
    if recipe.streaming:
        if recipe.trainer.get("max_steps", 0) < 1 or (recipe.eval_fraction and not held):
            raise UsageError("a stream has no end that is known: it needs trainer.max_steps, and --eval-data to evaluate",
                             hint="--set trainer.max_steps=1000")
        return open_stream(source, role, how, held), held
    train = load_rows(source, role, how=how)
    if held:
        check_leakage({"training data": train, "evaluation data": held}, how.note)
    elif recipe.eval_fraction:
        train, held = hold_out(train, recipe.eval_fraction)
    return train, held


def require(value: T | None, flag: str) -> T:
    if not value:
        raise UsageError(f"no {flag.lstrip('-').replace('-', ' ')} given", hint=f"pass {flag}, or set it in the recipe")
    return value


def is_chat(rows: Rows) -> bool:
    return any(isinstance(found[0].get("prompt"), list) for found in rows.values() if found)


def tokenizer_for(recipe: AnyRecipe, rows: Rows, quiet: bool) -> Any:
    """The base's tokenizer, with the chat template that the recipe chooses, after a look at what it makes of the rows."""
    tokenizer = load_tokenizer(require(recipe.model, "--model"), chat=is_chat(rows), template=recipe.chat_template)
    check_rendering(tokenizer, rows, recipe, lambda line: say(f"note: {line}", quiet=quiet))
    return tokenizer


def note_boundary(tokenizer: Any, rows: Rows, quiet: bool) -> None:
    """Say once, in one line, what TRL would say in seven: the chat template renders a prompt differently before an answer."""
    for found in rows.values():
        answer = next((key for key in ("completion", "chosen") if found and key in found[0]), None)
        if answer and boundary_moves(tokenizer, found[0], answer):
            say("note: the last tokens of a prompt change when an answer follows (chat template); the answer is taken from there",
                quiet=quiet)
            return


def count_dropped(trainer: Any, given: list[Row], quiet: bool, sft: list[Row] | None = None) -> None:
    """TRL drops rows whose prompt alone fills ``max_length``: say so, and refuse to train on none."""
    for kind, rows, left in (("", given, trainer.train_dataset), ("SFT ", sft, getattr(trainer, "sft_rows", None))):
        if rows is None or left is None or isinstance(rows, Stream):
            continue
        kept, why = len(left), f"the prompt alone fills max_length={trainer.args.max_length}"
        if not kept:
            raise MismatchError(f"no {kind}row is left to train on: {why}", hint="raise trainer.max_length")
        if kept < len(rows) and not getattr(trainer.args, "packing", False):
            say(f"note: {len(rows) - kept} of {len(rows)} {kind}rows dropped: {why}", quiet=quiet)
