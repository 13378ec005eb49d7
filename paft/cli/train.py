"""`paft train-sft`, `paft train-dpo`, `paft train-joint`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.cli.sample import sample_lines
from paft.errors import UsageError
from paft.launch import follow, launch, launched
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe, load
from paft.store import Store

MODEL = click.option("-m", "--model", metavar="MODEL", help="The base: a directory, a hub id org/name[@revision], or `demo`.")
ON = click.option("--on", metavar="ADAPTER", help="Train on top of this adapter (sequential); the result contains both.")
L1 = click.option("--l1", metavar="NUMBER", type=click.FloatRange(min=0),
                  help="λ of the L1 term λ·Σ|s·B·A|: a sum, so it depends on model size.")
FULL = click.option("--full", is_flag=True, default=None, help="Train every weight instead of an adapter; makes a model.")
L1_HOW = options.stack(
    click.option("--l1-solver", type=click.Choice(["subgradient", "proximal"]),
                 help="The paper's, or exact zeros in rows of B and columns of A  [default: subgradient]."),
    click.option("--l1-warmup", metavar="NUMBER", type=click.FloatRange(min=0),
                 help="Raise λ from 0 in so many steps, or below 1 in that share of them."),
    click.option("--l1-target-sparsity", metavar="SHARE", type=click.FloatRange(0, 1, min_open=True, max_open=True),
                 help="Find the λ at which this share of δ is zero, instead of --l1."),
)
BETA = click.option("--beta", metavar="NUMBER", type=click.FloatRange(min=0, min_open=True),
                    help="β of the preference loss  [default: 0.1; for simpo 2].")
LOSS = click.option("--loss", metavar="NAME[=WEIGHT],...",
                    help="sigmoid (DPO), ipo, hinge, robust, apo_zero, ..., kto, orpo, simpo, or a sum: sigmoid=1,sft=0.2"
                         "  [default: sigmoid].")
REFERENCE = click.option("--reference", metavar="base|chosen-sft|PATH",
                         help="What the loss compares with. base: the model that the policy starts from; chosen-sft: an SFT on"
                              " the chosen answers, trained first; or an adapter on the same base, or a model  [default: base].")
STREAMING = click.option("--streaming", is_flag=True, default=None, help="Read the data while training; needs trainer.max_steps.")
EVAL_FRACTION = click.option("--eval-fraction", metavar="NUMBER", type=click.FloatRange(0, 1, max_open=True),
                             help="Or hold out this share of the data.")
DATA = options.stack(
    click.option("-d", "--data", metavar="DATA", multiple=True,
                 help="File, directory, hub id org/name[@revision][#subset][:split], or demo:sft / demo:pref; may be repeated."),
    click.option("--mix", metavar="W,W,...", help="Shares of the data sets in the mixture, one for each --data."),
    click.option("--columns", metavar="OURS=THEIRS,...", help="Column names, e.g. prompt=question,completion=answer."),
    STREAMING,
    click.option("--eval-data", metavar="DATA", help="Held-out rows; their loss never contains the penalty."),
    EVAL_FRACTION,
)
ROWS = options.stack(
    click.option("--chat-template", metavar="NAME", help="zephyr, chatml, alpaca or a .jinja file, instead of the model's own."),
    click.option("--drop-bad-rows", "on_bad_row", flag_value="drop", default=None, help="Leave out rows that cannot be used."),
    click.option("--show-sample", is_flag=True, help="Print one row as the trainer sees it, with its loss mask, and stop."),
)
LAST = options.stack(
    ROWS, options.recipe_option, options.set_option("trainer.max_steps=100"),
    click.option("--seed", type=int, help="Seed of adapter, data order and dropout."),
    options.dry_run, options.overwrite,
    click.option("--resume", is_flag=True, help="Finish what a killed process began; the result is the same."),
    click.option("--devices", metavar="N", type=click.IntRange(1), help="Train on N GPUs of this machine, or N CPU processes."),
    click.option("--fsdp", is_flag=True, help="With --devices: shard the model over them (FSDP2); else a copy on each."),
    options.common,
)


@click.command("train-sft")
@options.stack(MODEL, DATA, options.out_option, L1, L1_HOW, ON, FULL, LAST)
def train_sft(**given: Any) -> None:
    """Train an SFT adapter, sparse with --l1.

    \b
    paft train-sft --model demo --data demo:sft --l1 1e-4 -o adapters/sft-l1
    paft train-sft -m org/name -d chat.jsonl --eval-fraction 0.1 --l1 1e-3
    paft train-sft -c sft-l1 --set trainer.max_steps=500 --dry-run
    """
    _train(SftRecipe, "sft-l1" if given["l1"] else "sft", given)


@click.command("train-dpo")
@options.stack(MODEL, DATA, options.out_option, LOSS, REFERENCE, BETA, L1, L1_HOW, ON, FULL, LAST)
def train_dpo(**given: Any) -> None:
    """Train a preference adapter, with DPO or another loss.

    The policy starts from the base, as PAFT's does, or from --on.

    \b
    paft train-dpo --model demo --data demo:pref -o adapters/dpo
    paft train-dpo -m org/name -d pairs.jsonl --beta 0.1 --eval-fraction 0.1
    paft train-dpo -m org/name -d pairs.jsonl --on adapters/sft -o adapters/both
    paft train-dpo -m org/name -d labels.jsonl --loss kto
    paft train-dpo -m org/name -d pairs.jsonl --reference chosen-sft
    """
    loss = given["loss"] = _loss(given["loss"])
    _train(DpoRecipe, loss if isinstance(loss, str) and loss != "sigmoid" else "dpo", given)


def _loss(text: str | None) -> str | dict[str, float] | None:
    """``ipo``, or ``sigmoid=1,sft=0.2`` as {name: weight}."""
    if text is None or not set(text) & set("=,"):
        return text
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, _, weight = item.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError:
            raise UsageError(f"--loss {text!r}: {weight!r} is no weight", hint="for example --loss sigmoid=1,sft=0.2") from None
    return weights


JOINT = options.stack(
    click.option("--method", type=click.Choice(["mix", "sequential", "alright", "maxright", "uft"]),
                 help="How the objectives share the steps  [default: mix]."),
    click.option("--lam", metavar="NUMBER", type=click.FloatRange(0, 1),
                 help="λ weights DPO: in a sum, as share of the steps, of the gap, or of the rows (uft)  [default: 0.5]."),
    click.option("--order", type=click.Choice(["dpo-sft", "sft-dpo"]), help="Of sequential  [default: dpo-sft]."),
    click.option("--max-eval-steps", metavar="K", type=click.IntRange(1),
                 help="maxright: evaluate both objectives every K steps  [default: 10]."),
    click.option("--smoothing", metavar="NUMBER", type=click.FloatRange(0, 1, max_open=True),
                 help="maxright: running mean of the gaps  [default: 0]."),
    click.option("--sft-opt", metavar="LOSS", type=float, help="f*, the least that the SFT loss comes to."),
    click.option("--dpo-opt", metavar="LOSS", type=float, help="f*, the least that the DPO loss comes to."),
    click.option("--estimate-optima", is_flag=True, default=None,
                 help="Train each objective alone first, at the same budget; kept beside the output for the next time."),
    click.option("--stop-front", metavar="DIR", help="Stop when no worse than the evaluations of this earlier training."),
    click.option("--uft-loss", type=click.Choice(["mse", "bce"]), help="uft: squared error or cross-entropy  [default: mse]."),
    click.option("--max-tokens", metavar="NUMBER", type=click.IntRange(1), help="Budget in tokens, not steps."),
)
JOINT_DATA = options.stack(
    click.option("--sft-data", metavar="DATA", multiple=True, help="Instruction rows, as --data of train-sft; may be repeated."),
    click.option("--pref-data", metavar="DATA", multiple=True, help="Preference rows, as --data of train-dpo; may be repeated."),
    click.option("--sft-columns", metavar="OURS=THEIRS,...", help="Column names of the instruction rows."),
    click.option("--pref-columns", metavar="OURS=THEIRS,...", help="Column names of the preference rows."),
    STREAMING,
    click.option("--sft-eval-data", metavar="DATA", help="Held-out instruction rows."),
    click.option("--pref-eval-data", metavar="DATA", help="Held-out preference rows."),
    EVAL_FRACTION,
)


@click.command("train-joint")
@options.stack(MODEL, JOINT_DATA, options.out_option, JOINT, LOSS, REFERENCE, BETA, L1, L1_HOW, ON, FULL, LAST)
def train_joint(**given: Any) -> None:
    """Train both objectives in one process, to compare with.

    mix: a weighted sum in each step. sequential: one after the other. alright: a coin picks one. maxright: the one that
    is farther from its optimum. uft: one loss for both, whose feedback may also be labels or scores from 0 to 1. With
    held-out rows both objectives are measured ten times; `paft compare` shows them.

    \b
    paft train-joint -m demo --sft-data demo:sft --pref-data demo:pref \\
        --method alright --lam 0.3 --eval-fraction 0.1
    paft train-joint -m demo --sft-data demo:sft --pref-data demo:pref \\
        --method maxright --estimate-optima --eval-fraction 0.1
    """
    given["loss"] = _loss(given["loss"])
    for key in ("sft_data", "pref_data"):
        given[key] = _sources(given[key])
    for key in ("sft_columns", "pref_columns"):
        given[key] = _columns(given[key])
    _train(JointRecipe, given["method"] or "joint", given)


OWN = {"sequential": ["order"], "maxright": ["max_eval_steps", "smoothing"], "uft": ["uft_loss"]}  # flags of one method


def _check_use(recipe: Any, given: dict[str, Any]) -> None:
    """UsageError for a flag of another method; in a file such a key may wait for its method."""
    own = OWN.get(getattr(recipe, "method", ""), [])
    others = {key: method for method, keys in OWN.items() for key in keys if key not in own}
    for key, method in others.items():
        if given.get(key) is not None:
            raise UsageError(f"--{key.replace('_', '-')} is of --method {method}, and this is {recipe.method}",
                             hint="leave it out, or change the method")


def _train(kind: type[Any], name: str, given: dict[str, Any]) -> None:
    names = ("file", "sets", "out", "overwrite", "resume", "dry_run", "show_sample", "as_json", "quiet", "traceback")
    common, devices, fsdp = {key: given.pop(key) for key in names}, given.pop("devices"), given.pop("fsdp")
    if fsdp and not devices:
        raise UsageError("--fsdp shards the model over several GPUs, and --devices says how many", hint="add --devices 8")
    given |= _data(given)
    file = options.recipe_file(common["file"])
    recipe = load(kind, file, common["sets"], given)
    if not recipe.l1 and recipe.l1_target_sparsity is None and (given["l1_solver"] or given["l1_warmup"]):
        raise UsageError("--l1-solver and --l1-warmup act on the L1 term, and there is none",
                         hint="add --l1 1e-4 or --l1-target-sparsity 0.9")
    _check_use(recipe, given)
    out = common["out"] or Path("adapters") / (file.stem if file else name)
    follow()
    if devices and not (launched(devices) or common["show_sample"] or common["dry_run"]):
        raise click.exceptions.Exit(launch(click.get_current_context().find_root().obj, devices, shard=fsdp))

    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.train import sample, stage
    from paft.train.work import leads

    if common["show_sample"]:
        found = sample.show_sample(recipe, quiet=common["quiet"])
        options.show(found, sample_lines(found), as_json=common["as_json"])
        return
    how = {key: common[key] for key in ("overwrite", "resume", "dry_run")}
    if common["dry_run"]:
        with options.making(out, **how) as place:
            plan = stage.plan(recipe, place, overwrite=common["overwrite"], quiet=common["quiet"]) | {"out": str(out)}
        options.show(plan, _plan_lines(plan), as_json=common["as_json"])
        return
    with options.making(out, **how) as place:
        manifest = stage.train(recipe, place, overwrite=common["overwrite"], resume=common["resume"], quiet=common["quiet"])
    if not leads():
        return
    options.show(manifest | {"out": str(out)}, _result_lines(manifest, out, recipe), as_json=common["as_json"])


def _data(given: dict[str, Any]) -> dict[str, Any]:
    """``--data``, ``--mix`` and ``--columns`` as the recipe writes them."""
    if "data" not in given:
        return {}
    data, mix = given["data"], given.pop("mix")
    said: dict[str, Any] = {"data": _sources(data), "columns": _columns(given["columns"])}
    if mix is not None:
        try:
            weights = [float(weight) for weight in mix.split(",")]
        except ValueError:
            raise UsageError(f"--mix {mix!r} is no list of numbers", hint="for example --mix 0.7,0.3") from None
        if len(weights) != len(data):
            raise UsageError(f"--mix has {len(weights)} weights for {len(data)} --data", hint="give one weight to each")
        said["data"] = [{"source": source, "weight": weight} for source, weight in zip(data, weights, strict=True)]
    return said


def _sources(data: tuple[str, ...]) -> str | list[str] | None:
    return (data[0] if len(data) == 1 else list(data)) if data else None


def _columns(text: str | None) -> dict[str, str] | None:
    """``prompt=question,completion=answer`` as {"prompt": "question", ...}."""
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise UsageError(f"--columns {text!r} is not ours=theirs,...", hint="for example --columns prompt=question")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    rows = ", ".join(f"{count} {name}" for name, count in plan["rows"].items() if count)
    made = "model" if plan["recipe"]["full"] else "adapter"
    left = f"  an unfinished one is there, at step {plan['unfinished']}: --resume finishes it"
    spent = f"{plan['steps']} steps of {plan['batch']} rows" if plan["steps"] else f"{plan['recipe']['max_tokens']} tokens"
    return [f"would {plan['command']} into {plan['out']}", f"  {spent}; the data hold {rows.replace('_', ' ')} rows",
            f"  {made} about {options.size(plan['adapter_bytes'])} on disk; base {options.size(plan['base_bytes'])}",
            f"  about {options.size(plan['memory_bytes'])} of memory, before activations"
            + (f"; {options.duration(plan['seconds'])} on this machine" if plan["seconds"] else ""),
            *(f"  {name}: {plan[name]}" for name in ("reference", "optima") if plan.get(name)),
            *([left] if plan["unfinished"] else [])]


def _result_lines(manifest: dict[str, Any], out: Path | Store, recipe: Any) -> list[str]:
    metrics = manifest["metrics"]
    names = {"task_loss": "train loss", "eval_loss": "held-out loss", "eval_rewards/accuracies": "held-out preference accuracy",
             "eval_sft_loss": "held-out SFT loss", "eval_dpo_loss": "held-out DPO loss",
             "eval_pref_accuracy": "preference accuracy", "eval_ideal_distance": "distance to the ideal point",
             "eval_rewards/margins": "margin", "eval_kl": "KL", "l1": "‖δ‖₁", "share_below_1e-5": "share below 1e-5",
             "share_zero": "share exactly zero", "l1_relative": "λ / rms entry gradient"}
    told = ", ".join(f"{label} {metrics[key]:.4g}" for key, label in names.items() if key in metrics)
    sparse = recipe.l1 or recipe.l1_target_sparsity
    follow = f"paft sparsity-report {out}" if sparse else f"paft merge {out} OTHER_ADAPTER --method ties"
    if isinstance(recipe, JointRecipe):  # is both already
        held = "eval_sft_loss" in metrics
        follow = f"paft compare {out} OTHER_TRAINING" if held else f"paft eval {out} --sft-data ... --pref-data ..."
    elif recipe.full:
        follow = f"paft merge {out} OTHER --base {recipe.model} --method ties"
    best = f", the best kept: that of step {int(metrics['best_step'])}" if "best_step" in metrics else ""
    first = f"{out}: {int(metrics['steps'])} steps in {manifest['wall_s']:.0f} s{best}"
    return [first, *textwrap.wrap(told, 79), f"next: {follow}"]
