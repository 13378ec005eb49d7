"""A training stage from recipe to adapter directory: data checked, trainer run, artefact complete or absent."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from paft import hub
from paft.adapter import CONFIG, WEIGHTS, Adapter, check_low_rank, concatenate, read_adapter, save_adapter
from paft.card import adapter_card
from paft.checkpoint import Checkpoint
from paft.data import Row, content_hash
from paft.errors import MismatchError, UsageError
from paft.models import linear_names, load_model, parameters, resolve_base, skeleton
from paft.placement import place
from paft.provenance import check_target, output_dir, tensor_files, write_manifest
from paft.provenance import content_hash as tensor_hash
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe
from paft.train import losses, reference
from paft.train.inputs import count_dropped, load, note_boundary, require, tokenizer_for
from paft.train.l1 import nonlinear_layers
from paft.train.options import check_options, lora_config, trainer_config
from paft.train.rendering import template_errors

AnyRecipe = SftRecipe | DpoRecipe | JointRecipe
Rows = dict[str, list[Row]]


def plan(recipe: AnyRecipe, out: Path, *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """What ``train`` would do, after every check that needs no model in memory."""
    check_target(out, overwrite=overwrite)
    check_trainer(recipe)
    rows = load(recipe, quiet)
    model = require(recipe.model, "--model")
    base = resolve_base(model)
    _start(recipe)
    held, more = reference.foretell(recipe, out) if isinstance(recipe, DpoRecipe) else (None, 0)
    tokenizer_for(recipe, rows, quiet)
    adapter = _adapter_parameters(recipe, base)
    size = sum(file.stat().st_size for file in tensor_files(base))
    args = trainer_config(_config_kind(recipe), recipe, tempfile.gettempdir())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = _steps(args, len(rows["pref" if "pref" in rows else "train"]))
    return {"command": recipe.kind, "out": str(out), "rows": {name: len(found) for name, found in rows.items()}, "steps": steps,
            "batch": batch, "base_bytes": size, "adapter_bytes": 4 * adapter,
            "reference": held, "memory_bytes": 4 * parameters(base) + 16 * adapter + more, "recipe": recipe.model_dump()}


def _steps(args: Any, rows: int) -> int:
    """Optimiser steps, as `Trainer` counts them where no row is dropped or packed."""
    if args.max_steps > 0:
        return args.max_steps
    batches = rows / args.per_device_train_batch_size
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(max(1, math.ceil(batches / args.gradient_accumulation_steps)) * args.num_train_epochs)


def _adapter_parameters(recipe: AnyRecipe, base: Path) -> int:
    """Trainable parameters, from a model without storage; MismatchError where ``lora.targets`` match nothing."""
    from peft import get_peft_model

    with _named_targets(recipe, skeleton(base)) as model:
        return get_peft_model(model, lora_config(recipe.lora), low_cpu_mem_usage=True).get_nb_trainable_parameters()[0]


@contextmanager
def _named_targets(recipe: AnyRecipe, model: Any) -> Iterator[Any]:
    """Refuse ``lora.targets`` that match nothing, or more than linear layers, with a line that names the linear layers.

    PEFT puts its layers into ``model`` itself, so the block may wrap it as it likes.
    """
    hint = "its linear layers are " + ", ".join(linear_names(model))
    try:
        yield model
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        raise MismatchError(f"lora.targets {recipe.lora.targets!r} match no module of {recipe.model}", hint=hint) from error
    if odd := nonlinear_layers(model):
        raise MismatchError(f"lora.targets {recipe.lora.targets!r} match {odd[0]}, which is no linear layer", hint=hint)


def train(recipe: AnyRecipe, out: Path, *, rows: Rows | None = None, overwrite: bool = False, quiet: bool = False,
          label: str | None = None) -> dict[str, Any]:
    """Train one adapter and write it to ``out`` (PEFT format, card, `paft.json`, log.jsonl); returns the manifest.

    ``rows`` replaces the recipe's data (a run has read and split it already). With ``recipe.on`` the start model is the base
    plus that adapter; the result is their exact sum as one adapter of rank r_on + r, so it loads on the plain base.
    """
    check_target(out, overwrite=overwrite)
    check_trainer(recipe)
    on = _start(recipe)
    rows = load(recipe, quiet) if rows is None else rows
    started = time.monotonic()
    with output_dir(out, overwrite=overwrite) as directory, tempfile.TemporaryDirectory() as scratch:
        inputs = {name: content_hash(found) for name, found in rows.items() if found}
        again = partial(train, quiet=quiet)
        held = reference.prepare(recipe, rows, directory, Path(scratch), again) if isinstance(recipe, DpoRecipe) else None
        rows = losses.shaped(recipe, rows) if isinstance(recipe, DpoRecipe) else rows
        trainer = _build(recipe, rows, scratch, held, quiet)
        note_boundary(trainer.processing_class, rows, quiet)
        count_dropped(trainer, rows["pref" if "pref" in rows else "train"], quiet)
        _run(trainer, label or out.name, directory / "log.jsonl", quiet)
        metrics = _metrics(trainer, bool(rows.get("eval")))
        _save(trainer, recipe, on, directory)
        manifest = write_manifest(
            directory, command=recipe.kind, recipe=recipe.model_dump(), seed=recipe.seed, base=_base(recipe),
            inputs=inputs, metrics=metrics, wall_s=round(time.monotonic() - started, 2),
            reference=held.of(trainer) if held else None,
        )
        card = adapter_card(out.name, base=recipe.model, recipe={"kind": recipe.kind, **recipe.model_dump(exclude_defaults=True)},
                            metrics=[metrics], tags=("paft", "lora", recipe.kind.removeprefix("train-")))
        (directory / "README.md").write_text(card, encoding="utf-8")
    return manifest


def _config_kind(recipe: AnyRecipe) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.sft_config import SFTConfig

    if isinstance(recipe, DpoRecipe):
        return losses.family(recipe).load()[1]
    return SFTConfig if isinstance(recipe, SftRecipe) else DPOConfig


def check_trainer(recipe: AnyRecipe) -> None:
    """UsageError for a loss, a reference or a ``trainer`` option that TRL does not have; loads no model."""
    if isinstance(recipe, DpoRecipe):
        losses.check(recipe)
        reference.check(recipe)
    check_options(_config_kind(recipe), recipe.trainer)


def _build(recipe: AnyRecipe, rows: Rows, scratch: str, held: reference.Reference | None, quiet: bool) -> Any:
    from transformers import set_seed

    from paft.train import joint, preference, sft

    set_seed(recipe.seed)  # PEFT draws A before the trainer sets its seed
    name = require(recipe.model, "--model")
    tokenizer = tokenizer_for(recipe, rows, quiet)
    with _usage(), template_errors(), _named_targets(recipe, load_model(name, on=recipe.on)) as model:
        if isinstance(recipe, JointRecipe):
            return joint.build(recipe, model, tokenizer, rows, scratch)
        if isinstance(recipe, DpoRecipe):
            return preference.build(recipe, model, tokenizer, rows["train"], rows["eval"], scratch, held, quiet=quiet)
        return sft.build(recipe, model, tokenizer, rows["train"], rows["eval"], scratch)


@contextmanager
def _usage(still_early: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """TRL refuses some values of its options only where it uses them: when the trainer is built, or in its first step."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if not still_early():
            raise
        raise UsageError(f"trainer: {(str(error).splitlines() or [''])[0][:200]}") from error


def _run(trainer: Any, label: str, log: Path, quiet: bool) -> None:
    from transformers.trainer_callback import PrinterCallback

    from paft.train.callbacks import Watch

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(label, log, quiet=quiet))
    with _usage(lambda: trainer.state.global_step == 0):
        trainer.train()


def _metrics(trainer: Any, evaluate: bool) -> dict[str, float]:
    """The last logged training values and, with evaluation data, all that TRL measures on them (never with the penalty)."""
    wanted = ("loss", "task_loss", "l1", "share_below_1e-5", "dpo_loss", "sft_loss",
              "rewards/accuracies", "rewards/margins", "kl")
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens")
    last: dict[str, float] = {}
    for record in trainer.state.log_history:
        last.update({key: record[key] for key in wanted if key in record})
    if evaluate:
        held = trainer.evaluate()
        last.update({key: value for key, value in held.items() if key.startswith("eval_") and key not in speed})
    last["steps"] = trainer.state.global_step
    return {key: round(float(value), 6) for key, value in last.items() if math.isfinite(float(value))}


def _start(recipe: AnyRecipe) -> Adapter | None:
    """The adapter to train on, if the sum of it and the trained one can be written; MismatchError before any work if not."""
    if recipe.on is None:
        return None
    on = place(read_adapter(recipe.on), Checkpoint.open(resolve_base(require(recipe.model, "--model")))).adapter
    check_low_rank(on)
    return on


def _save(trainer: Any, recipe: AnyRecipe, on: Adapter | None, directory: Path) -> None:
    # save_embedding_layers would ask the hub for the base's config; no layer of ours needs the answer.
    with tempfile.TemporaryDirectory() as scratch:
        trainer.model.save_pretrained(scratch, save_embedding_layers=False, selected_adapters=["default"])
        _name_base(Path(scratch) / CONFIG, str(recipe.model))  # first, since it also puts the targets into one order
        trained = read_adapter(scratch)  # refuses NaN: after the last step no loss would tell
        if on is None:
            for name in (WEIGHTS, CONFIG):
                shutil.copyfile(Path(scratch) / name, directory / name)
        else:
            config, tensors = concatenate([on, trained], [1.0, 1.0])
            save_adapter(directory, config, tensors)
            _name_base(directory / CONFIG, str(recipe.model))
    if recipe.chat_template:  # the base's own tokenizer would render messages in another way, or not at all
        trainer.processing_class.save_pretrained(directory)


def _name_base(file: Path, model: str) -> None:
    """Write the base as the user named it; a hub id with its revision, never a cache path."""
    repo, revision = hub.split_revision(model)
    config = json.loads(file.read_text())
    config.update(base_model_name_or_path=repo, revision=revision)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # PEFT writes a set in hash order
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _base(recipe: AnyRecipe) -> dict[str, Any]:
    path = resolve_base(str(recipe.model))
    base: dict[str, Any] = {"name": recipe.model, "content_sha256": tensor_hash(path)}
    if recipe.on:
        base["on"] = {"name": recipe.on, "content_sha256": tensor_hash(hub.resolve(recipe.on, kind="adapter"))}
    return base
