"""A training stage from recipe to adapter directory: data checked, trainer run, artefact complete or absent."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paft import hub
from paft.adapter import CONFIG, WEIGHTS, Adapter, check_low_rank, concatenate, read_adapter, save_adapter
from paft.card import adapter_card
from paft.checkpoint import Checkpoint
from paft.data import Row, check_leakage, content_hash, hold_out, load_rows
from paft.errors import MismatchError, UsageError
from paft.models import linear_names, load_model, load_tokenizer, parameters, resolve_base, skeleton
from paft.placement import place
from paft.progress import say
from paft.provenance import check_target, output_dir, tensor_files, write_manifest
from paft.provenance import content_hash as tensor_hash
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe
from paft.tokens import boundary_moves
from paft.train.l1 import nonlinear_layers
from paft.train.options import check_options, check_penalty, lora_config, trainer_config

AnyRecipe = SftRecipe | DpoRecipe | JointRecipe
Rows = dict[str, list[Row]]


def plan(recipe: AnyRecipe, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """What ``train`` would do, after every check that needs no model in memory."""
    check_target(out, overwrite=overwrite)
    rows = _load(recipe)
    model = _require(recipe.model, "--model")
    base = resolve_base(model)
    _start(recipe)
    check_trainer(recipe)
    load_tokenizer(model, chat=_is_chat(rows))
    adapter = _adapter_parameters(recipe, base)
    size = sum(file.stat().st_size for file in tensor_files(base))
    args = trainer_config(_config_kind(recipe), recipe, tempfile.gettempdir())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = _steps(args, len(rows["pref" if "pref" in rows else "train"]))
    return {"command": recipe.kind, "out": str(out), "rows": {name: len(found) for name, found in rows.items()}, "steps": steps,
            "batch": batch, "base_bytes": size, "adapter_bytes": 4 * adapter,
            "memory_bytes": 4 * parameters(base) + 16 * adapter, "recipe": recipe.model_dump()}


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
    on = _start(recipe)
    rows = _load(recipe) if rows is None else rows
    started = time.monotonic()
    with output_dir(out, overwrite=overwrite) as directory, tempfile.TemporaryDirectory() as scratch:
        trainer = _build(recipe, rows, scratch)
        _note_boundary(trainer.processing_class, rows, quiet)
        _note_dora(trainer, quiet)
        _count_dropped(trainer, len(rows["pref" if "pref" in rows else "train"]), quiet)
        _run(trainer, label or out.name, directory / "log.jsonl", quiet)
        metrics = _metrics(trainer, bool(rows.get("eval")))
        _save(trainer, recipe, on, directory)
        manifest = write_manifest(
            directory, command=recipe.kind, recipe=recipe.model_dump(), seed=recipe.seed, base=_base(recipe),
            inputs={name: content_hash(found) for name, found in rows.items() if found}, metrics=metrics,
            wall_s=round(time.monotonic() - started, 2),
        )
        card = adapter_card(out.name, base=recipe.model, recipe={"kind": recipe.kind, **recipe.model_dump(exclude_defaults=True)},
                            metrics=[metrics], tags=("paft", "lora", recipe.kind.removeprefix("train-")))
        (directory / "README.md").write_text(card, encoding="utf-8")
    return manifest


def _require(value: str | None, flag: str) -> str:
    if not value:
        raise UsageError(f"no {flag.lstrip('-').replace('-', ' ')} given", hint=f"pass {flag}, or set it in the recipe")
    return value


def _load(recipe: AnyRecipe) -> Rows:
    """Read and check the recipe's data: train and eval rows, or sft and pref rows for a joint recipe."""
    if isinstance(recipe, JointRecipe):
        if recipe.eval_fraction:
            raise UsageError("joint training holds no rows out, so eval_fraction has no use",
                             hint="score the adapter with `paft eval`")
        return {"sft": load_rows(_require(recipe.sft_data, "--sft-data"), "sft"),
                "pref": load_rows(_require(recipe.pref_data, "--pref-data"), "pref")}
    role = "pref" if isinstance(recipe, DpoRecipe) else "sft"
    train = load_rows(_require(recipe.data, "--data"), role)
    held: list[Row] = []
    if recipe.eval_data:
        held = load_rows(recipe.eval_data, role)
        check_leakage({"training data": train, "evaluation data": held})
    elif recipe.eval_fraction:
        train, held = hold_out(train, recipe.eval_fraction)
    return {"train": train, "eval": held}


def _config_kind(recipe: AnyRecipe) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig if isinstance(recipe, SftRecipe) else DPOConfig


def check_trainer(recipe: AnyRecipe) -> None:
    """UsageError for a ``trainer`` option that TRL does not have, or an L1 term that cannot be; loads no model."""
    check_options(_config_kind(recipe), recipe.trainer)
    check_penalty(recipe)


def _is_chat(rows: Rows) -> bool:
    return any(isinstance(found[0].get("prompt"), list) for found in rows.values() if found)


def _build(recipe: AnyRecipe, rows: Rows, scratch: str) -> Any:
    from transformers import set_seed

    from paft.train import dpo, joint, sft

    check_trainer(recipe)
    set_seed(recipe.seed)  # PEFT draws A before the trainer sets its seed
    name = _require(recipe.model, "--model")
    tokenizer = load_tokenizer(name, chat=_is_chat(rows))
    with _usage(), _named_targets(recipe, load_model(name, on=recipe.on)) as model:
        if isinstance(recipe, JointRecipe):
            return joint.build(recipe, model, tokenizer, rows, scratch)
        build = dpo.build if isinstance(recipe, DpoRecipe) else sft.build
        return build(recipe, model, tokenizer, rows["train"], rows["eval"], scratch)  # type: ignore[arg-type]


@contextmanager
def _usage(still_early: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """TRL refuses some values of its options only where it uses them: when the trainer is built, or in its first step."""
    try:
        yield
    except ValueError as error:
        if not still_early():
            raise
        raise UsageError(f"trainer: {(str(error).splitlines() or [''])[0][:200]}") from error


def _note_boundary(tokenizer: Any, rows: Rows, quiet: bool) -> None:
    """Say once, in one line, what TRL would say in seven: the chat template renders a prompt differently before an answer."""
    for found in rows.values():
        answer = next((key for key in ("completion", "chosen") if found and key in found[0]), None)
        if answer and boundary_moves(tokenizer, found[0], answer):
            say("note: the last tokens of a prompt change when an answer follows (chat template); the answer is taken from there",
                quiet=quiet)
            return


def _note_dora(trainer: Any, quiet: bool) -> None:
    if trainer.term.active and any(any(getattr(module, "use_dora", {}).values()) for module in trainer.model.modules()):
        say("note: with DoRA the L1 term acts on s·B·A; its magnitudes leave the merged change dense", quiet=quiet)


def _count_dropped(trainer: Any, given: int, quiet: bool) -> None:
    """TRL drops rows whose prompt alone fills ``max_length``: say so, and refuse to train on none."""
    kept, why = len(trainer.train_dataset), f"the prompt alone fills max_length={trainer.args.max_length}"
    if not kept:
        raise MismatchError(f"no row is left to train on: {why}", hint="raise trainer.max_length")
    if kept < given and not getattr(trainer.args, "packing", False):
        say(f"note: {given - kept} of {given} rows dropped: {why}", quiet=quiet)


def _run(trainer: Any, label: str, log: Path, quiet: bool) -> None:
    from transformers.trainer_callback import PrinterCallback

    from paft.train.callbacks import Watch

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(label, log, quiet=quiet))
    with _usage(lambda: trainer.state.global_step == 0):
        trainer.train()


def _metrics(trainer: Any, evaluate: bool) -> dict[str, float]:
    """The last logged losses, the L1 term as it ended and, with evaluation data, the held-out loss (never with the penalty)."""
    wanted = ("loss", "task_loss", "dpo_loss", "sft_loss")
    last: dict[str, float] = {}
    for record in trainer.state.log_history:
        last.update({key: record[key] for key in wanted if key in record})
    last.update(trainer.sparsity())
    if evaluate:
        held = trainer.evaluate()
        last.update({k: v for k, v in held.items() if k in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")})
    last["steps"] = trainer.state.global_step
    return {key: float(f"{value:.6g}") for key, value in last.items() if math.isfinite(float(value))}


def _start(recipe: AnyRecipe) -> Adapter | None:
    """The adapter to train on, if the sum of it and the trained one can be written; MismatchError before any work if not."""
    if recipe.on is None:
        return None
    on = place(read_adapter(recipe.on), Checkpoint.open(resolve_base(_require(recipe.model, "--model")))).adapter
    check_low_rank(on)
    return on


def _save(trainer: Any, recipe: AnyRecipe, on: Adapter | None, directory: Path) -> None:
    # save_embedding_layers would ask the hub for the base's config; no layer of ours needs the answer.
    with tempfile.TemporaryDirectory() as scratch:
        trainer.model.save_pretrained(scratch, save_embedding_layers=False)
        _name_base(Path(scratch) / CONFIG, str(recipe.model))  # first, since it also puts the targets into one order
        trained = read_adapter(scratch)  # refuses NaN: after the last step no loss would tell
        if on is None:
            for name in (WEIGHTS, CONFIG):
                shutil.copyfile(Path(scratch) / name, directory / name)
        else:
            config, tensors = concatenate([on, trained], [1.0, 1.0])
            save_adapter(directory, config, tensors)
            _name_base(directory / CONFIG, str(recipe.model))


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
