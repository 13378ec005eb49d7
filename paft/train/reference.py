"""π_ref of a preference loss: the start model with the adapter off, another adapter on the same base, or a second model.

    base        the model that the policy starts from, adapter off (with --on: base and that adapter). No second model in memory
    chosen-sft  base + an SFT on the chosen answers of the same data, trained first and kept in ``reference/`` of the output
                (XRIGHT's, arXiv 2410.15483); costs one more training
    an adapter  a path or hub id: laid beside the trained one on the same copy of the base; costs its factors' memory
    a model     a path or hub id: a second model in memory, with the policy's vocabulary

TRL computes log π_ref under an adapter called ``ref`` where a model has one, and makes one only as a copy of the trained
adapter; others are laid in its place here. A reference has no dropout, and is never saved with the trained adapter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft import hub, provenance
from paft.adapter import CONFIG, check_low_rank, concatenate, read_adapter, save_adapter
from paft.checkpoint import Checkpoint
from paft.data import Row, content_hash
from paft.errors import MismatchError, NotFoundError, UsageError, did_you_mean
from paft.models import load_tokenizer, parameters, resolve_base
from paft.placement import place
from paft.recipe import SftRecipe
from paft.train import losses
from paft.train.options import check_options

if TYPE_CHECKING:
    from paft.recipe import PreferenceRecipe

BASE, CHOSEN = "base", "chosen-sft"
FOLDER = "reference"
Rows = dict[str, list[Row]]

# What the SFT of `chosen-sft` takes over from the recipe's ``trainer``: how long, and what fits the device; not the rate.
SHARED = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length",
          "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "logging_steps", "bf16", "fp16",
          "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
          "activation_checkpointing_kwargs", "optim")


@dataclass(frozen=True)
class Reference:
    """What stands for π_ref: ``adapter`` (relative to the start model), ``model``, or neither; ``record`` is for the manifest."""

    adapter: Path | None = None
    model: str | None = None
    record: dict[str, Any] | None = field(default_factory=lambda: {"name": BASE})

    def of(self, trainer: Any) -> dict[str, Any] | None:
        """The record of a finished training; None for a loss without a reference."""
        return self.record and self.record | {"precomputed": trainer.precompute_ref_logps}


def check(recipe: PreferenceRecipe) -> None:
    """UsageError for a reference that the loss does not have, or settings of one that is not asked for; opens no file."""
    if recipe.reference and not losses.family(recipe).reference:
        name = next(iter(recipe.loss))
        raise UsageError(f"loss {name} has no reference: --reference {recipe.reference} has no use", hint="leave it out")
    if recipe.reference_sft and recipe.reference != CHOSEN:
        raise UsageError(f"reference_sft has a use with reference: {CHOSEN} only", hint=f"--reference {CHOSEN}")
    if recipe.reference == CHOSEN and recipe.streaming:
        raise UsageError(f"--reference {CHOSEN} reads the rows twice, so they cannot be streamed",
                         hint="train the SFT first and pass its adapter as --reference")
    if recipe.reference == CHOSEN:
        from trl.trainer.sft_config import SFTConfig

        check_options(SFTConfig, chosen_sft(recipe).trainer)


def check_files(recipe: PreferenceRecipe) -> None:
    """Raises NotFoundError, MismatchError or UsageError for a named reference that does not fit the base or its vocabulary."""
    name = _named(recipe)
    if name is None:
        return
    directory = _directory(name)
    base = resolve_base(str(recipe.model))
    if _is_adapter(directory) and recipe.full:
        raise MismatchError(f"the reference {name} is an adapter, and with full there is none to lay it beside",
                            hint="fold it into its base and pass that model as --reference")
    if _is_adapter(directory):
        recorded = provenance.recorded_base(directory)
        if recorded and recorded != (found := provenance.content_hash(base)):
            raise MismatchError(
                f"the reference {name} was trained on a base of content {recorded[:12]}, {base.name} has {found[:12]}",
                hint="pass a reference on the same base, or fold it into its base and pass that model")
        adapter = read_adapter(name)
        place(adapter, Checkpoint.open(base))
        if recipe.on:
            check_low_rank(adapter)
        if adapter.config.get("bias", "none") != "none":
            raise MismatchError(f"the reference {name} brings biases, which PEFT would put in place of the policy's too",
                                hint="fold it into its base and pass that model as --reference")
        return
    resolve_base(name)
    _check_vocabulary(name, str(recipe.model))


def foretell(recipe: PreferenceRecipe, out: Path) -> tuple[str | None, int]:
    """(what π_ref will be, in words; bytes of memory that it adds), after `check_files`; None for a loss without one."""
    check_files(recipe)
    if not losses.family(recipe).reference:
        return None, 0
    name = _named(recipe)
    if name is None:
        first = f"an SFT on the chosen answers, trained first and kept in {out / FOLDER}"
        return first if recipe.reference == CHOSEN else "the start model, adapter off", 0
    directory = _directory(name)
    if _is_adapter(directory):
        return f"the adapter {name} on the same base", sum(file.stat().st_size for file in provenance.tensor_files(directory))
    return f"the model {name}, a second one in memory", 4 * parameters(directory)


def prepare(recipe: PreferenceRecipe, rows: Rows, out: Path, scratch: Path, train: Callable[..., Any]) -> Reference:
    """The recipe's reference; ``chosen-sft`` is trained first, under ``out``/reference, by ``train`` (`paft.train.stage.train`).

    An adapter is a change of the base. With ``recipe.on`` the start model has another one folded in, so that what is laid on it
    is their exact difference: ref - on, of rank r_ref + r_on.
    """
    check_files(recipe)
    name = _named(recipe)
    if not losses.family(recipe).reference:
        return Reference(record=None)
    if recipe.reference == CHOSEN:
        path = _trained(recipe, rows, out / FOLDER, train)
        record = {"name": CHOSEN, "path": FOLDER, "content_sha256": provenance.content_hash(path)}
    elif name is None:
        return Reference()
    else:
        path = _directory(name)
        record = {"name": name, "content_sha256": provenance.content_hash(path)}
    if not _is_adapter(path):
        return Reference(model=name or str(path), record=record)
    if recipe.on:
        config, tensors = concatenate([read_adapter(path), read_adapter(recipe.on)], [1.0, -1.0])
        path = scratch / "difference"
        path.mkdir()
        save_adapter(path, config, tensors)
    return Reference(adapter=path, record=record)


def named_hash(recipe: PreferenceRecipe) -> str | None:
    """The content of a reference that is named by path or hub id; None for one that follows from the recipe."""
    name = _named(recipe)
    return provenance.content_hash(_directory(name)) if name else None


def chosen_sft(recipe: PreferenceRecipe) -> SftRecipe:
    """The SFT of ``chosen-sft``: same base, LoRA (or none), seed, length and batches; ``reference_sft`` are further fields."""
    shared = {key: recipe.trainer[key] for key in SHARED if key in recipe.trainer}
    return SftRecipe(model=recipe.model, on=recipe.on, full=recipe.full, dtype=recipe.dtype, quantize=recipe.quantize,
                     lora=recipe.lora, seed=recipe.seed,
                     chat_template=recipe.chat_template, trainer=shared | recipe.reference_sft)


def chosen_rows(rows: list[Row]) -> list[Row]:
    """The answers to learn from: chosen ones of pairs, desirable ones of labelled rows, those with scores above 1/2."""
    return [{"prompt": row["prompt"], "completion": row.get("chosen", row.get("completion"))} for row in rows
            if row.get("label", True) > 0.5]


def attach(trainer: Any, reference: Reference) -> None:
    """Lay the reference adapter beside the trained one as ``ref``, frozen and without dropout."""
    if reference.adapter is None or reference.record is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from torch.nn import Identity

    name = reference.record["name"]
    try:
        with warnings.catch_warnings():  # PEFT leaves what the file lacks at its random start, with a warning
            warnings.filterwarnings("error", message="Found missing adapter keys")
            trainer.model.load_adapter(str(reference.adapter), "ref")
    except (RuntimeError, ValueError, OSError, UserWarning) as error:
        raise MismatchError(f"the reference {name} does not fit this base: {str(error).splitlines()[0][:200]}") from error
    if isinstance(trainer.model.get_output_embeddings(), BaseTunerLayer | ModulesToSaveWrapper):
        raise MismatchError(f"the reference {name} changes lm_head, which TRL reads past the adapters",
                            hint="fold it into its base and pass that model as --reference")
    for module in trainer.model.modules():
        if "ref" in getattr(module, "lora_dropout", ()):
            module.lora_dropout["ref"] = Identity()


def _named(recipe: PreferenceRecipe) -> str | None:
    """The reference where it is named by path or hub id, and is not the start model itself."""
    if recipe.reference in (None, BASE, CHOSEN):
        return None
    start = None if recipe.on else resolve_base(str(recipe.model)).resolve()
    return None if _directory(recipe.reference).resolve() == start else recipe.reference


def _directory(name: str) -> Path:
    hint = did_you_mean(name, [BASE, CHOSEN])
    if not Path(name).expanduser().exists() and hint.startswith("did you mean"):
        raise UsageError(f"there is no reference {name!r}", hint=hint)
    directory = hub.resolve(name, kind="reference", patterns=hub.MODEL_FILES)
    if not any((directory / config).is_file() for config in (CONFIG, "config.json")):
        raise NotFoundError(f"the reference {name} is neither an adapter nor a model",
                            hint=f"it holds no {CONFIG} and no config.json")
    return directory


def _is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def _check_vocabulary(name: str, policy: str) -> None:
    """The same token ids go into both models, so each must mean the same in both."""
    theirs, ours = (load_tokenizer(one, chat=False).get_vocab() for one in (name, policy))
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            found = f"id {theirs[token]}" if token in theirs else "not in it"
            raise MismatchError(f"the reference {name} has another vocabulary: {token!r} is id {index} here, there {found}",
                                hint="take a reference with the tokenizer of --model")


def _trained(recipe: PreferenceRecipe, rows: Rows, target: Path, train: Callable[..., Any]) -> Path:
    """The adapter of `chosen_sft`; one that stands there already, from the same recipe and rows, is kept."""
    sft = chosen_sft(recipe)
    answers = {name: chosen_rows(found) for name, found in rows.items()}
    made = provenance.read_manifest(target)
    same = made and made["recipe"] == json.loads(json.dumps(sft.model_dump())) and made["inputs"] == {
        name: content_hash(found) for name, found in answers.items() if found}
    if not (same and not provenance.verify(target)):
        train(sft, target, rows=answers, overwrite=True, label=FOLDER)
    return target
