"""f*: the least that each objective comes to, which optimality gaps are measured from.

Given by ``sft_opt`` and ``dpo_opt``, or estimated as the authors do (arXiv 2410.15483, section 6.1): each objective is trained
alone, at the same budget. The two trainings are ordinary adapters under ``optima-HASH/`` beside the output, where HASH is that
of all that they depend on (recipe, base, data), so that every λ and every method on the same data finds them again. There is no
default: with f* = 0 MAXRIGHT would take SFT for ever, since its loss has a floor and that of DPO begins at ln 2.
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
from paft.train.work import PLACES, turn_at
from paft.train.work import place as partial_of

if TYPE_CHECKING:
    from paft.recipe import JointRecipe

LAST = 0.1  # the share of the steps whose mean loss is f* on training batches
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
    found = {}
    with turn_at(place, quiet=quiet):
        for name, lam in zip(OBJECTIVES, (1.0, 0.0), strict=True):
            alone = recipe.model_copy(update={**neutral, "method": "alright", "lam": lam})
            begun_before = (place / name).exists() or partial_of(place / name).exists()
            train(alone, place / name, label=f"{name} alone", resume=begun_before)
            found[name] = _read(place / name, name)
    step, held = ({name: each[which] for name, each in found.items() if which in each} for which in ("step", "held"))
    return Optima(step, held, {"estimated": found, "path": place.name})


def _hash(begun: Mapping[str, Any]) -> str:
    recipe = {key: value for key, value in begun["recipe"].items() if key not in (*FREE, *PLACES)}
    what = [recipe, begun["inputs"], begun["base"], begun["reference_sha256"]]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _read(directory: Path, name: str) -> dict[str, float]:
    """f* of a finished training from its log: the mean loss of its last steps, and the lowest held-out loss."""
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(each["step"], each[f"{name}_loss"]) for each in records if f"{name}_loss" in each]
    if not losses:
        raise MismatchError(f"{directory} has logged no {name} loss", hint="lower trainer.logging_steps, or train longer")
    since = (1 - LAST) * max(step for step, _ in losses)
    last = [loss for step, loss in losses if step > since]
    held = [each[f"eval_{name}_loss"] for each in records if f"eval_{name}_loss" in each]
    return {"step": sum(last) / len(last), **({"held": min(held)} if held else {})}
