"""A training stage from recipe to adapter directory: data checked, trainer run, artefact complete or absent."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from paft.adapter import Adapter, check_low_rank, read_adapter
from paft.checkpoint import Checkpoint
from paft.data import Row, content_hash
from paft.errors import MismatchError, ResourceError, UsageError, first_line
from paft.models import linear_names, load_model, parameters, resolve_base, skeleton
from paft.placement import place
from paft.progress import say
from paft.provenance import check_target, tensor_files
from paft.recipe import DpoRecipe, JointRecipe, PreferenceRecipe, SftRecipe
from paft.train import artefact, budget, forecast, losses, optima, reference, work
from paft.train.checks import (
    check_evaluation,
    check_names,
    check_room,
    check_start,
    evaluated,
    fitted,
    keep_reports_quiet,
    note_dora,
    note_packing,
)
from paft.train.dense import Start
from paft.train.distributed import join, said_by_the_first
from paft.train.inputs import count_dropped, load, note_boundary, require, tokenizer_for
from paft.train.interleave import Seat, TakeTurns, twin
from paft.train.l1 import lora_factors, nonlinear_layers
from paft.train.methods import trainer_of
from paft.train.metrics import final
from paft.train.optima import Optima
from paft.train.options import check_options, check_penalty, lora_config, trainer_config
from paft.train.rendering import template_errors

AnyRecipe = SftRecipe | DpoRecipe | JointRecipe
Rows = dict[str, list[Row]]


def plan(recipe: AnyRecipe, out: Path, *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """What ``train`` would do, after every check that needs no model in memory; ``unfinished`` is the step of a killed one."""
    check_target(out, overwrite=overwrite)
    left = work.newest(work.place(out))
    check_trainer(recipe)
    rows = load(recipe, quiet)
    check_evaluation(recipe, rows)
    require(recipe.model, "--model")
    _start(recipe)
    held, more = reference.foretell(recipe, out) if isinstance(recipe, PreferenceRecipe) else (None, 0)
    found = costs(recipe, rows, quiet=quiet)
    return {"command": recipe.kind, "out": str(out), "unfinished": work.step_of(left) if left else None,
            "rows": {name: len(each) for name, each in rows.items()}, "reference": held,
            "optima": optima.foretell(recipe) if isinstance(recipe, JointRecipe) else None, **found,
            "memory_bytes": found["memory_bytes"] + more, "recipe": recipe.model_dump()}


def costs(recipe: AnyRecipe, rows: Rows, *, quiet: bool = False) -> dict[str, Any]:
    """Steps, seconds (`paft.train.forecast`) and bytes of a training on ``rows``; the reference's memory is not among them."""
    base = resolve_base(require(recipe.model, "--model"))
    recipe = fitted(recipe, base, _config_kind(recipe).max_length)
    tokenizer = tokenizer_for(recipe, rows, quiet)
    adapter = _adapter_parameters(recipe, base)
    width = 0.6 if recipe.quantize else {"float32": 4, "bfloat16": 2}[recipe.dtype]  # bytes a parameter of the frozen base
    args = trainer_config(_config_kind(recipe), recipe, tempfile.gettempdir())
    joint = isinstance(recipe, JointRecipe)
    steps = trainer_of(recipe).foreseen(recipe, args, rows) if joint else budget.of_epochs(args, len(rows["train"]))
    return {"steps": steps, "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
            "seconds": round(forecast.seconds(recipe, base, tokenizer, rows, args, steps), 1),
            "base_bytes": sum(file.stat().st_size for file in tensor_files(base)), "adapter_bytes": 4 * adapter,
            "memory_bytes": (0 if recipe.full else round(width * parameters(base))) + 16 * adapter}


def _adapter_parameters(recipe: AnyRecipe, base: Path) -> int:
    """Trainable parameters, from a model without storage; MismatchError where ``lora.targets`` match nothing."""
    from peft import get_peft_model

    if recipe.full:
        return parameters(base)
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
        if odd := re.match(r"Target module (\w+)\(.* is not supported", str(error), flags=re.S):
            said = f"lora.targets {recipe.lora.targets!r} match a {odd[1]}, which LoRA cannot adapt"
            raise MismatchError(said, hint=hint) from error
        if "arget modules" not in str(error):
            raise
        raise MismatchError(f"lora.targets {recipe.lora.targets!r} match no module of {recipe.model}", hint=hint) from error
    if recipe.full:
        return
    if odd := nonlinear_layers(model):
        raise MismatchError(f"lora.targets {recipe.lora.targets!r} match {odd[0]}, which is no linear layer", hint=hint)
    check_names(recipe.lora, [name for name, *_ in lora_factors(model)], [name for name, _ in model.named_modules()])


def train(recipe: AnyRecipe, out: Path, *, rows: Rows | None = None, overwrite: bool = False, resume: bool = False,
          quiet: bool = False, label: str | None = None, seat: Seat | None = None,
          held: reference.Reference | None = None) -> dict[str, Any]:
    """Train one adapter and write it to ``out`` (PEFT format, card, `paft.json`, log.jsonl); returns the manifest.

    ``rows`` replaces the recipe's data (a run has read and split it already). With ``recipe.on`` the start model is the base
    plus that adapter; the result is their exact sum as one adapter of rank r_on + r, so it loads on the plain base. ``resume``
    finishes what a killed process began in ``out``.partial (`paft.train.work`), to the bit; with nothing there it starts, and
    an ``out`` that the same recipe, base and data have made already is returned as it is. Under `accelerate launch` every
    process calls this; the first one writes. With a ``seat`` it takes turns over one base (`paft.train.interleave`);
    ``held`` is a reference that is prepared already.
    """
    quiet = quiet or not work.leads()
    if not resume:
        check_target(out, overwrite=overwrite)
    check_trainer(recipe)
    on = _start(recipe)
    rows = load(recipe, quiet) if rows is None else rows
    check_evaluation(recipe, rows)
    base = resolve_base(require(recipe.model, "--model"))
    check_room(recipe, base, out, _adapter_parameters(recipe, base))
    join(recipe.trainer)
    begun = said_by_the_first(partial(_begun, recipe, rows))
    if resume and not overwrite and (manifest := work.finished(out, begun)):
        say(f"{out} is finished already", quiet=quiet)
        return manifest
    check_target(out, overwrite=overwrite)
    with (work.work_dir(out, begun, resume=resume, overwrite=overwrite, quiet=quiet) as running,
          tempfile.TemporaryDirectory() as scratch):
        best, again = Optima(), partial(train, resume=resume, quiet=quiet)
        if isinstance(recipe, PreferenceRecipe) and held is None:
            held = reference.prepare(recipe, _pairs(rows), running.directory, Path(scratch), again)
        if isinstance(recipe, DpoRecipe):
            rows = losses.shaped(recipe, rows)
        if isinstance(recipe, JointRecipe):
            best = optima.prepare(recipe, begun, out, partial(train, rows=rows, quiet=quiet, held=held), quiet=quiet)
        fit = fitted(recipe, base, _config_kind(recipe).max_length, quiet=quiet)
        trainer = _build(fit, rows, str(running.directory), held, best, quiet, seat)
        _note(trainer, recipe, rows, quiet)
        _run(trainer, label or out.name, running, quiet, seat)
        metrics = final(trainer, evaluate=bool(evaluated(rows)))
        told = {**begun, "max_length": trainer.args.max_length, "metrics": metrics,
                "reference": held.of(trainer) if held else None, "optima": best.record}
        state = artefact.state_of(trainer.model)
        if work.leads():
            told = artefact.write(trainer, recipe, on, out, running, told, state=state, overwrite=overwrite)
        trainer.accelerator.wait_for_everyone()
        return told


def _note(trainer: Any, recipe: AnyRecipe, rows: Rows, quiet: bool) -> None:
    """Say what a trainer that is built makes of the recipe and the rows."""
    note_packing(recipe, quiet=quiet)
    note_dora(trainer, quiet=quiet)
    note_boundary(trainer.processing_class, rows, quiet)
    given = trainer_of(recipe).answers(recipe, rows) if isinstance(recipe, JointRecipe) else rows["train"]
    count_dropped(trainer, given, quiet, rows.get("sft"))


def _begun(recipe: AnyRecipe, rows: Rows) -> dict[str, Any]:
    """What a training is, before its first step: `paft.json` repeats it, and a resumed training must have it in common."""
    return {"command": recipe.kind, "recipe": recipe.model_dump(), "seed": recipe.seed, "base": artefact.base(recipe),
            "inputs": {name: content_hash(found) for name, found in rows.items() if found},
            "reference_sha256": reference.named_hash(recipe) if isinstance(recipe, PreferenceRecipe) else None}


def _pairs(rows: Rows) -> Rows:
    """The preference rows, by the names of a training on them alone."""
    return {"train": rows["pref"], "eval": rows.get("pref_eval", [])} if "pref" in rows else rows


def _config_kind(recipe: AnyRecipe) -> Any:
    from trl.trainer.sft_config import SFTConfig

    if isinstance(recipe, JointRecipe):
        return trainer_of(recipe).config(recipe)
    return losses.family(recipe).load()[1] if isinstance(recipe, PreferenceRecipe) else SFTConfig


def check_trainer(recipe: AnyRecipe) -> None:
    """UsageError for a loss, a reference, an L1 term or a ``trainer`` option that cannot be; loads no model."""
    if isinstance(recipe, PreferenceRecipe):
        losses.check(recipe)
        reference.check(recipe)
    if isinstance(recipe, JointRecipe):
        trainer_of(recipe).check(recipe)
        optima.check(recipe)
    check_options(_config_kind(recipe), recipe.trainer)
    check_penalty(recipe)


def _build(recipe: AnyRecipe, rows: Rows, scratch: str, held: reference.Reference | None, best: Optima, quiet: bool,
           seat: Seat | None) -> Any:
    from transformers import set_seed

    from paft.train import preference, sft

    keep_reports_quiet(recipe.trainer.get("report_to"))
    set_seed(recipe.seed)  # PEFT draws A before the trainer sets its seed
    name = require(recipe.model, "--model")
    tokenizer = tokenizer_for(recipe, rows, quiet)
    with _usage(), template_errors(), _named_targets(recipe, twin(seat.base) if seat else start_model(recipe)) as model:
        if isinstance(recipe, JointRecipe):
            trainer = trainer_of(recipe).build(recipe, model, tokenizer, rows, scratch, held, best, quiet=quiet)
        elif isinstance(recipe, DpoRecipe):
            trainer = preference.build(recipe, model, tokenizer, rows["train"], rows["eval"], scratch, held, quiet=quiet)
        else:
            trainer = sft.build(recipe, model, tokenizer, rows["train"], rows["eval"], scratch)
        if recipe.full and (recipe.l1 or recipe.l2):
            trainer.start = Start(resolve_base(name), trainer.model)
        if recipe.quantize:
            _widen(trainer.model)
        return trainer


def start_model(recipe: AnyRecipe) -> Any:
    """The model that is adapted, in memory."""
    return load_model(str(recipe.model), on=recipe.on, dtype=recipe.dtype, quantize=recipe.quantize)


def _widen(model: Any) -> None:
    """TRL casts the adapter of a quantised model to bfloat16, in which a step below 1/256 of a factor's entry is lost: undone."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def _usage(still_early: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """TRL refuses some values of its options only where it uses them: when the trainer is built, or in its first step."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if not still_early():
            raise
        raise UsageError(f"trainer: {first_line(error)}") from error
    except (ImportError, RuntimeError) as error:
        if not (still_early() and "install" in str(error)):  # a report, an optimiser or a kernel from another package
            raise
        raise ResourceError(f"trainer: {first_line(error)}") from error


def _run(trainer: Any, label: str, running: work.Work, quiet: bool, seat: Seat | None) -> None:
    from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback

    from paft.train.callbacks import Watch
    from paft.train.keeper import Keeper

    trainer.remove_callback(PrinterCallback)
    if stopping := trainer.recipe.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(stopping.patience, stopping.threshold))
    trainer.add_callback(Keeper(trainer, running))
    trainer.add_callback(Watch(label, running.log, quiet=quiet, told=getattr(trainer, "told", dict)))
    if seat:
        trainer.add_callback(TakeTurns(seat.turn))
    if trainer.args.world_size != (asked := int(os.environ.get("WORLD_SIZE", "1"))):
        raise ResourceError(f"{asked} processes were launched, and {trainer.args.world_size} found each other",
                            hint="launch one for each GPU, or set trainer.use_cpu")
    trainer.accelerator.wait_for_everyone()
    running.join()
    trainer.args.eval_on_start &= running.checkpoint is None  # `Trainer` would evaluate again where it goes on
    with _usage(lambda: trainer.state.global_step == 0):
        trainer.train(resume_from_checkpoint=str(running.checkpoint) if running.checkpoint else None)


def _start(recipe: AnyRecipe) -> Adapter | None:
    """The adapter to train on, if the sum of it and the trained one can be written; MismatchError before any work if not."""
    check_start(recipe)
    if recipe.on is None:
        return None
    on = place(read_adapter(recipe.on), Checkpoint.open(resolve_base(require(recipe.model, "--model")))).adapter
    check_low_rank(on)
    return on
