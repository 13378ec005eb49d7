"""Which of TRL's preference trainers computes a loss, and with what options: the table behind ``loss`` of a recipe.

    family  trainer                  losses                                         reference  rows
    dpo     trl.DPOTrainer           sigmoid, ipo, hinge, ... (those of DPOConfig)  yes        pairs
    kto     trl.KTOTrainer           kto, apo_zero_unpaired (those of KTOConfig)    yes        answers with a label
    orpo    trl.experimental.orpo    orpo                                           no         pairs
    cpo     trl.experimental.cpo     simpo                                          no         pairs

Only losses of the dpo family add up: ``loss: {sigmoid: 1, sft: 0.2}`` is 1·L_sigmoid + 0.2·L_sft of one forward pass. TRL's
defaults hold but for those in `_DEFAULTS`, where they would make a loss another one (robust) or fail (exo_pair).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paft.data import Role, Row
from paft.errors import ResourceError, UsageError, did_you_mean

if TYPE_CHECKING:
    from paft.recipe import PreferenceRecipe

Options = dict[str, Any]

_DEFAULTS: dict[str, Options] = {
    "robust": {"label_smoothing": 0.1},  # typical in the paper; at 0 it is sigmoid
    "exo_pair": {"label_smoothing": 1e-3},  # the paper's; TRL refuses 0
    "simpo": {"cpo_alpha": 0.0},  # above 0 it is CPO-SimPO
}


@dataclass(frozen=True)
class Family:
    """The losses of one trainer; ``load`` imports (the trainer with the penalty mixed in, its config).

    ``refuse`` raises UsageError for options that TRL refuses late or takes in silence. ``typed``: the config has a ``loss_type``.
    """

    name: str
    load: Callable[[], tuple[type, type]]
    refuse: Callable[[list[str], Options], None]
    reference: bool = True
    labelled: bool = False
    combines: bool = False
    typed: bool = True
    streams: bool = True


def families() -> dict[str, Family]:
    """Every loss and its family."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.kto_config import KTOConfig

    names = [(name, DPO) for name in re.findall(r"`'(\w+)'`", _field(DPOConfig, "loss_type")["help"])]
    names += [(name, KTO) for name in _field(KTOConfig, "loss_type")["choices"]]
    return dict([*names, ("orpo", ORPO), ("simpo", CPO)])


def family(recipe: PreferenceRecipe) -> Family:
    """The family that computes all of the recipe's losses; UsageError for an unknown one and for a sum that no trainer has."""
    names, known = list(recipe.loss), families()
    if not names:
        raise UsageError("loss: names no loss", hint="leave it out for sigmoid, which is DPO")
    for name in names:
        if name not in known:
            raise UsageError(f"there is no loss {name!r}", hint=did_you_mean(name, known))
        if len(names) > 1 and not known[name].combines:
            raise UsageError(f"loss {name!r} cannot be added to others", hint=_summable(known))
        if not known[name].combines and recipe.loss[name] != 1:
            raise UsageError(f"loss {name!r} takes no weight", hint="scale trainer.learning_rate instead")
    return known[names[0]]


def _summable(known: dict[str, Family]) -> str:
    return "these can: " + ", ".join(name for name, found in known.items() if found.combines)


def options(recipe: PreferenceRecipe) -> Options:
    """The fields of TRL's config that say which loss it is; the recipe's ``trainer`` section comes after them."""
    found, named = family(recipe), recipe.loss
    said: Options = {"beta": recipe.beta}
    for name in named:
        said |= _DEFAULTS.get(name, {})
    if found.combines:
        said |= {"loss_type": list(named), "loss_weights": list(named.values())}
    elif found.typed:
        said |= {"loss_type": next(iter(named))}
    return said


def check(recipe: PreferenceRecipe) -> None:
    """UsageError for a loss, or an option of it, that cannot be; loads no model."""
    found = family(recipe)
    for key in ("loss_type", "loss_weights"):
        if key in recipe.trainer:
            raise UsageError(f"trainer.{key} is set by `loss`", hint="loss: ipo, or with weights loss: {sigmoid: 1, sft: 0.2}")
    if recipe.streaming and not found.streams:
        raise UsageError(f"loss {next(iter(recipe.loss))} cannot stream: TRL's trainer wants all rows at once",
                         hint="leave --streaming out")
    found.refuse(list(recipe.loss), options(recipe) | recipe.trainer)


def check_pairs(recipe: PreferenceRecipe) -> None:
    """UsageError for a loss that DPO's trainer, which joint training is built on, does not have."""
    if not family(recipe).combines:
        name = next(iter(recipe.loss))
        raise UsageError(f"loss {name} is none of pairs with a reference, which joint training takes",
                         hint=f"`paft train-dpo --loss {name}`, or here " + _summable(families()).removeprefix("these can: "))


def role(recipe: PreferenceRecipe) -> Role:
    """The shape of rows that the recipe's loss reads."""
    return "unpaired" if family(recipe).labelled else "pref"


def shaped(recipe: PreferenceRecipe, rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows in the shape that the loss reads; those that a run hands over are pairs."""
    apart = family(recipe).labelled
    return {name: unpair(found) if apart and found and "chosen" in found[0] else found for name, found in rows.items()}


def unpair(pairs: list[Row]) -> list[Row]:
    """Two rows for each pair: (prompt, chosen, true) and (prompt, rejected, false)."""
    return [{"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
            for pair in pairs for key in ("chosen", "rejected")]


def _field(kind: Any, name: str) -> Any:
    return next(field.metadata for field in dataclasses.fields(kind) if field.name == name)


def _refuse_dpo(names: list[str], said: Options) -> None:
    if said.get("padding_free"):
        raise UsageError("trainer.padding_free has no effect: TRL's DPOTrainer pads all the same", hint="leave it out")
    smoothing = said.get("label_smoothing", 0.0)
    if "robust" in names and not 0 <= smoothing < 0.5:
        raise UsageError(f"loss robust needs 0 <= trainer.label_smoothing < 0.5, got {smoothing}")


def _refuse_kto(names: list[str], said: Options) -> None:
    """The KL term pairs a prompt with its neighbour's answer within a batch, so batches are fixed and hold two rows or more."""
    if names == ["kto"] and said.get("per_device_train_batch_size", 8) < 2:
        raise UsageError("loss kto needs trainer.per_device_train_batch_size >= 2: its KL term pairs rows of one batch",
                         hint="raise it, or use --loss apo_zero_unpaired")
    if names == ["kto"] and said.get("train_sampling_strategy", "sequential") != "sequential":
        raise UsageError("loss kto needs trainer.train_sampling_strategy=sequential: its KL term pairs neighbours",
                         hint="leave it out: paft shuffles the rows once, by seed")


def _refuse_old(names: list[str], said: Options) -> None:
    if said.get("max_length", 1024) is None:
        raise UsageError(f"loss {names[0]} needs trainer.max_length: TRL's trainer would cut at 512 tokens", hint="set a number")


def _load_dpo() -> tuple[type, type]:
    from trl.trainer.dpo_config import DPOConfig

    from paft.train.dpo import PenalisedDPOTrainer

    return PenalisedDPOTrainer, DPOConfig


def _load_kto() -> tuple[type, type]:
    from trl.trainer.kto_config import KTOConfig

    from paft.train.dpo import PenalisedKTOTrainer

    return PenalisedKTOTrainer, KTOConfig


def _experimental(name: str) -> tuple[type, type]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.cpo import CPOConfig
        from trl.experimental.orpo import ORPOConfig

        from paft.train.reference_free import PenalisedCPOTrainer, PenalisedORPOTrainer
    except ImportError as error:
        raise ResourceError(f"this TRL has no trainer for {name}: {error}", hint="install trl 1.16") from error
    return {"orpo": (PenalisedORPOTrainer, ORPOConfig), "simpo": (PenalisedCPOTrainer, CPOConfig)}[name]


DPO = Family("dpo", _load_dpo, _refuse_dpo, combines=True)
KTO = Family("kto", _load_kto, _refuse_kto, labelled=True)
ORPO = Family("orpo", lambda: _experimental("orpo"), _refuse_old, reference=False, typed=False, streams=False)
CPO = Family("cpo", lambda: _experimental("simpo"), _refuse_old, reference=False, streams=False)
