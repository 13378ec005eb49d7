"""Preference training: a recipe's loss and reference into the one of TRL's trainers that has them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from paft.data import Row, Stream, dataset
from paft.errors import UsageError
from paft.models import load_model
from paft.progress import say
from paft.train import losses
from paft.train.dense import dense
from paft.train.options import peft_config, trainer_config
from paft.train.precompute import precompute
from paft.train.reference import Reference, attach

if TYPE_CHECKING:
    from paft.recipe import DpoRecipe, PreferenceRecipe


def build(recipe: DpoRecipe, model: Any, tokenizer: Any, rows: list[Row], eval_rows: list[Row], scratch: str,
          reference: Reference | None = None, *, quiet: bool = False) -> Any:
    """A trainer for ``recipe``, ready to train. Raises UsageError for labels that are all alike."""
    family = losses.family(recipe)
    if family.labelled:
        rows, eval_rows = (_shuffled(found, recipe.seed) for found in (rows, eval_rows))
    trainer = construct(recipe, model, tokenizer, rows, eval_rows, scratch, reference, kind=family.load()[0],
                        learning_rate=5e-7 if recipe.full else 5e-6)
    if family.labelled:
        _check_balance(rows, trainer.args, quiet)
    if family.reference:
        precompute(trainer, recipe.trainer.get("precompute_ref_log_probs"), quiet=quiet)
    return trainer


def construct(recipe: PreferenceRecipe, model: Any, tokenizer: Any, rows: list[Row], eval_rows: list[Row], scratch: str,
              reference: Reference | None, *, kind: type, **defaults: Any) -> Any:
    """A trainer of ``kind`` with its reference; ``peft_config`` (not a PeftModel) makes TRL take the adapter-off model as one.

    ``reference`` stands in its place (`paft.train.reference.prepare`). A whole model (``recipe.full``) has no adapter to turn
    off: there TRL loads the base a second time, which leaves again if the reference's log-probabilities are computed first.
    ``defaults`` are options of TRL's that the recipe may replace.
    """
    reference = reference or Reference()
    config = losses.family(recipe).load()[1]
    args: Any = trainer_config(config, recipe, scratch, **defaults, **losses.options(recipe))
    args.precompute_ref_log_probs = False  # see paft.train.precompute
    second = {"ref_model": load_model(reference.model, dtype=recipe.dtype)} if reference.model else {}
    make = dense(kind) if recipe.full else kind
    trainer = make(model=model, args=args, processing_class=tokenizer, train_dataset=dataset(rows),
                   eval_dataset=dataset(eval_rows) if eval_rows else None, peft_config=peft_config(recipe), **second)
    trainer.recipe = recipe
    attach(trainer, reference)
    return trainer


def _shuffled(rows: list[Row], seed: int) -> list[Row]:
    """Labelled rows in one random order.

    KTO reads its rows in order, since each batch pairs neighbours for the KL term. TRL takes pairs apart into a thousand
    desirable rows followed by a thousand undesirable ones, so that a batch would hold one kind only. A stream is mixed already.
    """
    if isinstance(rows, Stream):
        return rows
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def _check_balance(rows: list[Row], args: Any, quiet: bool) -> None:
    """Refuse labels of one kind; note weights outside of 1 <= (w_D·n_D)/(w_U·n_U) <= 4/3 (KTO, eq. 8)."""
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    if isinstance(rows, Stream):
        return
    if not (good and bad):
        raise UsageError(f"all {len(rows)} labels are {'true' if good else 'false'}: there is nothing to tell apart",
                         hint="add rows of the other kind, or train an SFT on the desirable ones")
    ratio = args.desirable_weight * good / (args.undesirable_weight * bad)
    if not 0.99 <= ratio <= 4 / 3 + 0.01:
        least = args.undesirable_weight * bad / good
        say(f"note: {good} desirable and {bad} undesirable rows; KTO balances them with trainer.desirable_weight "
            f"{least:.2f} to {4 / 3 * least:.2f}", quiet=quiet)
