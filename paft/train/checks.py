"""What of a training recipe can be judged against base and data before any model is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from paft.errors import MismatchError, ResourceError, UsageError
from paft.models import check_quantize, load_config, parameters
from paft.preflight import check_disk, check_memory
from paft.progress import say
from paft.recipe import JointRecipe, TrainRecipe
from paft.sections import Lora
from paft.train import front
from paft.train.options import wants_evaluation

R = TypeVar("R", bound=TrainRecipe)


def fitted(recipe: R, base: Path, default: int | None, *, quiet: bool = False) -> R:
    """``recipe`` with ``trainer.max_length`` cut to the positions that the model has; ``default`` is TRL's.

    Beyond them a model with a table of positions fails and one with rotary embeddings sees what it never saw in training.
    """
    limit = getattr(load_config(base).get_text_config(), "max_position_embeddings", None)
    asked = recipe.trainer.get("max_length", default)
    if limit is None or (asked is not None and asked <= limit):
        return recipe
    if "max_length" in recipe.trainer:
        say(f"note: max_length {asked} cut to {limit}, the positions of {recipe.model}", quiet=quiet)
    return recipe.model_copy(update={"trainer": {**recipe.trainer, "max_length": limit}})


def note_dora(trainer: Any, *, quiet: bool = False) -> None:
    """Say what an L1 term cannot do under DoRA."""
    if trainer.term.active and any(any(getattr(module, "use_dora", {}).values()) for module in trainer.model.modules()):
        say("note: with DoRA the L1 term acts on s·B·A; its magnitudes leave the merged change dense", quiet=quiet)


def note_packing(recipe: TrainRecipe, *, quiet: bool = False) -> None:
    """Say what TRL's packing does: by ``bfd`` (its default) rows do not see each other, on a CPU too; by ``wrapped`` they do."""
    if recipe.trainer.get("packing") and recipe.trainer.get("packing_strategy") == "wrapped":
        say("note: packing_strategy wrapped cuts rows apart and lets them see each other; bfd does not", quiet=quiet)


def check_evaluation(recipe: TrainRecipe, rows: Mapping[str, Sequence[Any]]) -> None:
    """UsageError where the recipe judges by evaluation data and there are none; what `front.check` raises."""
    if (key := wants_evaluation(recipe)) and not evaluated(rows):
        flags = "--sft-eval-data and --pref-eval-data" if "pref" in rows else "--eval-data"
        raise UsageError(f"{key} needs evaluation data", hint=f"pass {flags}, or --eval-fraction 0.1")
    if isinstance(recipe, JointRecipe):
        front.check(recipe, rows)


def evaluated(rows: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """Held-out rows; those of joint training have two names, and are given for both sets or none."""
    return rows.get("eval") or rows.get("sft_eval") or ()


def check_start(recipe: TrainRecipe) -> None:
    """UsageError where what is trained cannot be put together with what it is trained on; ResourceError for a missing package."""
    lora = recipe.lora
    odd = {"full": recipe.full, "quantize": recipe.quantize, "lora.dora": lora.dora, "lora.modules_to_save": lora.modules_to_save,
           "lora.bias": lora.bias != "none"}
    if recipe.on and (key := next((key for key, used in odd.items() if used), None)):
        raise UsageError(f"{key} does not go with --on: the adapters would not add up exactly",
                         hint="merge the first adapter into the base (`paft merge`), and train on that")
    if recipe.full and (recipe.quantize or recipe.dtype != "float32"):
        raise UsageError(f"full fine-tuning needs the base in float32, not in {recipe.quantize or recipe.dtype}",
                         hint="leave dtype and quantize out; trainer.bf16=true computes in bfloat16")
    check_quantize(recipe.quantize)


def check_room(recipe: TrainRecipe, base: Path, out: Path, trained: int) -> None:
    """ResourceError where the weights alone fit into no memory, or what is made of ``trained`` parameters onto no disk.

    A lower bound: 16 bytes a parameter that is trained (weight, gradient, two moments of Adam), and the width of the frozen
    base; activations come on top. On disk the result, and for a whole model a checkpoint of it.
    """
    import torch

    width = 0.5 if recipe.quantize else {"float32": 4, "bfloat16": 2}[recipe.dtype]
    needed = 16 * trained + (0 if recipe.full else width * parameters(base))
    said, hint = f"to train {recipe.model}", "choose a smaller base, a smaller lora.r, dtype: bfloat16"
    if not torch.cuda.is_available():
        check_memory(said, needed, f"{hint}, or a machine with more memory")
    elif (free := sum(torch.cuda.mem_get_info(index)[1] for index in range(torch.cuda.device_count()))) < needed:
        raise ResourceError(f"{said} takes {needed / 1e9:.1f} GB for the weights, and the GPUs have {free / 1e9:.1f} GB",
                            hint=f"{hint} or quantize: 4bit")
    check_disk(out, (16 if recipe.full else 4) * trained)


def check_names(lora: Lora, adapted: Sequence[str], every: Sequence[str]) -> None:
    """MismatchError for a name or a pattern in the recipe's ``lora`` that matches nothing: PEFT would pass it over.

    ``adapted`` are the names of the modules that have factors now, ``every`` those of all modules.
    """
    ends = {"targets": adapted, "exclude": every, "modules_to_save": every}
    for section, names in ends.items():
        said = getattr(lora, section)
        for wanted in said if isinstance(said, list) else ():
            if not any(f".{name}".endswith(f".{wanted}") for name in names):
                raise MismatchError(f"lora.{section}: no module's name ends in {wanted!r}", hint=_first(adapted))
    for section in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, section):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise MismatchError(f"lora.{section}: {pattern!r} matches none of the {len(adapted)} adapted modules",
                                    hint=_first(adapted))


def _first(adapted: Sequence[str]) -> str | None:
    return f"an adapted one is {adapted[0]}" if adapted else None


def keep_reports_quiet(report_to: str | Sequence[str] | None) -> None:
    """No login prompt: Weights & Biases without a key, or with the hub offline, stays on the disk (WANDB_MODE=offline)."""
    if "wandb" not in ([report_to] if isinstance(report_to, str) else report_to or []) or "WANDB_MODE" in os.environ:
        return
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
    if not known or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        os.environ["WANDB_MODE"] = "offline"
        say("note: WANDB_MODE=offline: " + ("HF_HUB_OFFLINE is set" if known else "there is no key; `wandb login` sets one"))
