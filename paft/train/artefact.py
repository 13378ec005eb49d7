"""What a training leaves: the adapter in PEFT's format, its log, a card and `paft.json`, complete or absent."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paft import hub
from paft.adapter import CONFIG, WEIGHTS, Adapter, concatenate, read_adapter, save_adapter
from paft.card import adapter_card, model_card
from paft.errors import MismatchError
from paft.models import load_config, resolve_base
from paft.provenance import content_hash, output_dir, write_manifest
from paft.recipe import TrainRecipe
from paft.train.l1 import is_sharded, whole
from paft.train.work import Work

STEP = ("learning_rate", "lr_scheduler_type", "optim", "weight_decay")


def base(recipe: TrainRecipe) -> dict[str, Any]:
    """The base, and the adapter that is trained on, by name and content."""
    path = resolve_base(str(recipe.model))
    found: dict[str, Any] = {"name": recipe.model, "content_sha256": content_hash(path)}
    if recipe.on:
        found["on"] = {"name": recipe.on, "content_sha256": content_hash(hub.resolve(recipe.on, kind="adapter"))}
    return found


def state_of(model: Any) -> dict[str, Any] | None:
    """What is trained, gathered where FSDP2 shards it, which every process must take part in; None where it lies whole."""
    trained = {name: theta.detach() for name, theta in model.named_parameters() if theta.requires_grad}
    return {name: whole(theta).cpu() for name, theta in trained.items()} if any(map(is_sharded, trained.values())) else None


def write(trainer: Any, recipe: TrainRecipe, on: Adapter | None, out: Path, running: Work, told: dict[str, Any], *,
          state: dict[str, Any] | None, overwrite: bool) -> dict[str, Any]:
    """Write what ``trainer`` has learned to ``out``, as its sum with ``on`` if there is one; ``told`` goes into `paft.json`.

    ``state`` is that of `state_of`. Full fine-tuning leaves a model that plain transformers loads, and that `paft merge --base`
    takes as θ − θ_pre.
    """
    with output_dir(out, overwrite=overwrite, room=running.room) as directory:
        if recipe.full:
            save_model(trainer, resolve_base(str(recipe.model)), directory, state)
        else:
            save(trainer, recipe, on, directory, state)
            if recipe.chat_template:  # the base's own tokenizer would render messages in another way, or not at all
                trainer.processing_class.save_pretrained(directory)
        shutil.copyfile(running.log, directory / running.log.name)
        for folder in ("runs", "reference"):  # TensorBoard's, and the adapter of `chosen-sft`
            if (running.directory / folder).is_dir():
                shutil.copytree(running.directory / folder, directory / folder)
        if torch.cuda.is_available():
            told = {**told, "peak_device_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1)}
        args = trainer.args.to_dict()  # with the defaults that the recipe left: the size of δ is a matter of the learning rate
        manifest = write_manifest(directory, **told, resolved={key: args[key] for key in STEP}, wall_s=round(running.wall, 2))
        said = {"kind": told["command"], **recipe.model_dump(exclude_defaults=True)}
        make, kind = (partial(model_card, relation="finetune"), "full") if recipe.full else (adapter_card, "lora")
        card = make(out.name, base=recipe.model, recipe=said, metrics=[told["metrics"]],
                    tags=("paft", kind, told["command"].removeprefix("train-")))
        (directory / "README.md").write_text(card, encoding="utf-8")
    return manifest


def save_model(trainer: Any, base: Path, directory: Path, state: dict[str, Any] | None) -> None:
    """The model and its tokenizer as transformers writes them; MismatchError for a parameter that is no number."""
    for name, theta in (state or dict(trainer.model.named_parameters())).items():
        if not theta.isfinite().all():  # after the last step no loss would tell
            raise MismatchError(f"{name} holds NaN or infinity: training has diverged", hint="lower trainer.learning_rate")
    trainer.model.config.use_cache = getattr(load_config(base), "use_cache", True)  # off while it trains
    trainer.model.save_pretrained(directory, state_dict=state)
    trainer.processing_class.save_pretrained(directory)


def save(trainer: Any, recipe: TrainRecipe, on: Adapter | None, directory: Path, state: dict[str, Any] | None) -> None:
    """The adapter in a file of PEFT's, checked by reading it again; with ``on``, their sum."""
    # save_embedding_layers would ask the hub for the base's config; no layer of ours needs the answer.
    with tempfile.TemporaryDirectory() as scratch:
        trainer.model.save_pretrained(scratch, save_embedding_layers=False, selected_adapters=["default"], state_dict=state)
        name_base(Path(scratch) / CONFIG, str(recipe.model))  # first, since it also puts the targets into one order
        trained = read_adapter(scratch)  # refuses NaN: after the last step no loss would tell
        if on is None:
            for name in (WEIGHTS, CONFIG):
                shutil.copyfile(Path(scratch) / name, directory / name)
        else:
            config, tensors = concatenate([on, trained], [1.0, 1.0])
            save_adapter(directory, config, tensors)
            name_base(directory / CONFIG, str(recipe.model))


def name_base(file: Path, model: str) -> None:
    """Write the base as the user named it; a hub id with its revision, never a cache path."""
    repo, revision = hub.split_revision(model)
    config = json.loads(file.read_text())
    config.update(base_model_name_or_path=repo, revision=revision)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # PEFT writes a set in hash order
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
