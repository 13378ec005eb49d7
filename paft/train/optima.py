"""f*: the least that each objective comes to, which optimality gaps are measured from.

Given by ``sft_opt`` and ``dpo_opt``, or estimated as the authors do (arXiv 2410.15483, section 6.1): each objective is trained
alone, at the same budget. On held-out rows f* is the least that either of the two came to: with few preference data SFT alone may
lower the DPO loss further than DPO does. The two trainings are ordinary adapters under ``optima-HASH/`` beside the output, where
HASH is that of all that they depend on (recipe, base, data), so that every λ and every method on the same data finds them
again. There is no default: with f* = 0 MAXRIGHT would take SFT for ever, since its loss has a floor and that of DPO begins at
ln 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft.errors import MismatchError, UsageError
from paft.train.schedules import OBJECTIVES, SCHEDULES
from paft.train.work import PLACES, read_log, turn_at
from paft.train.work import place as partial_of

if TYPE_CHECKING:
    from paft.recipe import JointRecipe

# The steps at the end whose mean loss is f* on training batches: a tenth, and more of a short training, as batches differ.
LAST, FEW = 0.1, 20
# What a training of one objective alone does not depend on.
FREE = ("method", "order", "lam", "max_eval_steps", "smoothing", "sft_opt", "dpo_opt", "estimate_optima", "stop_front",
        "uft_loss", "l1", "l1_solver", "l1_warmup", "l1_scaled", "l1_target_sparsity", "l2")


@dataclass(frozen=True)
class Optima:
    """{"dpo": f*, "sft": f*} of ``step``, the loss on training batches, and of ``held``, that on held-out rows; may be empty."""

    step: Mapping[str, float] = field(default_factory=dict)
    held: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None


def check(recipe: JointRecipe) -> None:
    """UsageError for a method that needs f* where it is neither given nor to be estimated, or for one of two."""
    said = given(recipe)
    compares = recipe.method in SCHEDULES and SCHEDULES[recipe.method](recipe, 1).compares
    if len(said) == 1:
        raise UsageError(f"--{next(iter(said))}-opt alone says nothing of the other objective",
                         hint="pass both --sft-opt and --dpo-opt, or --estimate-optima")
    if said and recipe.estimate_optima:
        raise UsageError("--estimate-optima looks for what --sft-opt and --dpo-opt say", hint="pass the one or the others")
    if compares and not said and not recipe.estimate_optima:
        raise UsageError(f"{recipe.method} compares f - f* of both objectives, and f* is not known",
                         hint="pass --estimate-optima, or --sft-opt and --dpo-opt")


def given(recipe: JointRecipe) -> dict[str, float]:
    return {name: value for name, value in (("dpo", recipe.dpo_opt), ("sft", recipe.sft_opt)) if value is not None}


def foretell(recipe: JointRecipe) -> str | None:
    """What `prepare` will do, in words."""
    return "DPO and SFT, trained alone first; optima-* beside it keeps them" if recipe.estimate_optima else None


def prepare(recipe: JointRecipe, begun: Mapping[str, Any], out: Path, train: Callable[..., Any], *,
            quiet: bool = False) -> Optima:
    """The optima of ``recipe``; where they are to be estimated, ``train(recipe, out, label=...)`` trains what is not there yet.

    What another process estimates at the same time is waited for.

    ``begun`` is what identifies the training (`paft.train.stage`): its recipe, and the content of base, reference and data.
    """
    if said := given(recipe):
        return Optima(said, said, {"given": said})
    if not recipe.estimate_optima:
        return Optima()
    place = out.parent / f"optima-{_hash(begun)}"
    neutral = {key: type(recipe).model_fields[key].get_default() for key in FREE}
    with turn_at(place, quiet=quiet):
        for name, lam in zip(OBJECTIVES, (1.0, 0.0), strict=True):
            alone = recipe.model_copy(update={**neutral, "method": "alright", "lam": lam})
            begun_before = (place / name).exists() or partial_of(place / name).exists()
            train(alone, place / name, label=f"{name} alone", resume=begun_before)
        logs = {name: read_log(place / name / "log.jsonl") for name in OBJECTIVES}
    step = {name: _last(logs[name], name, place / name) for name in OBJECTIVES}
    held = {name: min(seen) for name in OBJECTIVES
            if (seen := [each[f"eval_{name}_loss"] for log in logs.values() for each in log if "eval_loss" in each])}
    found = {name: {"step": step[name], **({"held": held[name]} if held else {})} for name in OBJECTIVES}
    return Optima(step, held, {"estimated": found, "path": place.name})


def _hash(begun: Mapping[str, Any]) -> str:
    recipe = {key: value for key, value in begun["recipe"].items() if key not in (*FREE, *PLACES)}
    base = [each["content_sha256"] for each in (begun["base"], begun["base"].get("on")) if each]
    what = [recipe, begun["inputs"], base, begun["reference_sha256"]]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _last(log: list[dict[str, Any]], name: str, directory: Path) -> float:
    """f* on training batches: the mean loss of a training's last steps."""
    losses = [(each["step"], each[f"{name}_loss"]) for each in log if f"{name}_loss" in each]
    if not losses:
        raise MismatchError(f"{directory} has logged no {name} loss", hint="lower trainer.logging_steps, or train longer")
    steps = max(step for step, _ in losses)
    since = steps - max(LAST * steps, min(FEW, steps / 2))
    last = [loss for step, loss in losses if step > since]
    return sum(last) / len(last)
