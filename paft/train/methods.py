"""Which trainer a joint recipe's method is: that of two objectives by a schedule, or that of the unified loss.

Each of the two modules has ``check(recipe)``, ``config(recipe)`` (the class of TRL's options), ``ROLE`` (the shapes of feedback
that it reads), ``answers(recipe, rows)`` (the rows that TRL's trainer gets), ``foreseen(recipe, args, rows)`` (steps, before any
row is rendered) and ``build(recipe, model, tokenizer, rows, scratch, reference, optima)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paft.train import joint, uft
from paft.train.schedules import SCHEDULES

if TYPE_CHECKING:
    from paft.recipe import JointRecipe


def trainer_of(recipe: JointRecipe) -> Any:
    """The module that trains by the recipe's method."""
    return joint if recipe.method in SCHEDULES else uft
