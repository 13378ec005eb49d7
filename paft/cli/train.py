"""`paft train-sft`, `paft train-dpo`, `paft train-joint`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.errors import UsageError
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe, load

MODEL = click.option("-m", "--model", metavar="MODEL", help="The base: a directory, a hub id org/name[@revision], or `demo`.")
ON = click.option("--on", metavar="ADAPTER", help="Train on top of this adapter (sequential); the result contains both.")
L1 = click.option("--l1", metavar="NUMBER", type=click.FloatRange(min=0),
                  help="λ of the L1 term λ·Σ|s·B·A|: a sum, so it depends on model size.")
L1_HOW = options.stack(
    click.option("--l1-solver", type=click.Choice(["subgradient", "proximal"]),
                 help="The paper's, or exact zeros in rows of B and columns of A  [default: subgradient]."),
    click.option("--l1-warmup", metavar="NUMBER", type=click.FloatRange(min=0),
                 help="Raise λ from 0 in so many steps, or below 1 in that share of them."),
    click.option("--l1-target-sparsity", metavar="SHARE", type=click.FloatRange(0, 1, min_open=True, max_open=True),
                 help="Find the λ at which this share of δ is zero, instead of --l1."),
)
BETA = click.option("--beta", metavar="NUMBER", type=click.FloatRange(min=0, min_open=True),
                    help="β of the DPO loss  [default: 0.1].")
DATA = options.stack(
    click.option("-d", "--data", metavar="DATA", help="File, directory, hub id org/name[:split], or demo:sft / demo:pref."),
    click.option("--eval-data", metavar="DATA", help="Held-out rows; their loss never contains the penalty."),
    click.option("--eval-fraction", metavar="NUMBER", type=click.FloatRange(0, 1, max_open=True),
                 help="Or hold out this share of the data."),
)
LAST = options.stack(
    options.recipe_option, options.set_option("trainer.max_steps=100"),
    click.option("--seed", type=int, help="Seed of adapter, data order and dropout."),
    options.dry_run, options.overwrite, options.common,
)


@click.command("train-sft")
@options.stack(MODEL, DATA, options.out_option, L1, L1_HOW, ON, LAST)
def train_sft(**given: Any) -> None:
    """Train an SFT adapter, sparse with --l1.

    \b
    paft train-sft --model demo --data demo:sft --l1 1e-4 -o adapters/sft-l1
    paft train-sft -m org/name -d chat.jsonl --eval-fraction 0.1 --l1 1e-3
    paft train-sft -c sft-l1 --set trainer.max_steps=500 --dry-run
    """
    _train(SftRecipe, "sft-l1" if given["l1"] else "sft", given)


@click.command("train-dpo")
@options.stack(MODEL, DATA, options.out_option, BETA, L1, L1_HOW, ON, LAST)
def train_dpo(**given: Any) -> None:
    """Train a DPO adapter; its reference is the base.

    \b
    paft train-dpo --model demo --data demo:pref -o adapters/dpo
    paft train-dpo -m org/name -d pairs.jsonl --beta 0.1 --eval-fraction 0.1
    paft train-dpo -m org/name -d pairs.jsonl --on adapters/sft -o adapters/both
    """
    _train(DpoRecipe, "dpo", given)


@click.command("train-joint")
@options.stack(
    MODEL,
    click.option("--sft-data", metavar="DATA", help="Instruction rows: a file, a directory, a hub id, or demo:sft."),
    click.option("--pref-data", metavar="DATA", help="Preference rows: a file, a directory, a hub id, or demo:pref."),
    options.out_option,
    click.option("--method", type=click.Choice(["mix"]), help="How the objectives share the steps  [default: mix]."),
    click.option("--lam", metavar="NUMBER", type=click.FloatRange(0, 1),
                 help="λ weights DPO: λ·DPO + (1-λ)·SFT  [default: 0.5]."),
    BETA, L1, L1_HOW, ON, LAST,
)
def train_joint(**given: Any) -> None:
    """Train both objectives in one process, to compare with.

    \b
    paft train-joint -m demo --sft-data demo:sft --pref-data demo:pref --lam 0.3
    """
    _train(JointRecipe, "joint", given)


def _train(kind: type[Any], name: str, given: dict[str, Any]) -> None:
    common = {key: given.pop(key) for key in ("file", "sets", "out", "overwrite", "dry_run", "as_json", "quiet", "traceback")}
    file = options.recipe_file(common["file"])
    recipe = load(kind, file, common["sets"], given)
    if not recipe.l1 and recipe.l1_target_sparsity is None and (given["l1_solver"] or given["l1_warmup"]):
        raise UsageError("--l1-solver and --l1-warmup act on the L1 term, and there is none",
                         hint="add --l1 1e-4 or --l1-target-sparsity 0.9")
    out = common["out"] or Path("adapters") / (file.stem if file else name)

    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.train import stage

    if common["dry_run"]:
        plan = stage.plan(recipe, out, overwrite=common["overwrite"])
        options.show(plan, _plan_lines(plan), as_json=common["as_json"])
        return
    manifest = stage.train(recipe, out, overwrite=common["overwrite"], quiet=common["quiet"])
    lines = _result_lines(manifest, out, bool(recipe.l1 or recipe.l1_target_sparsity))
    options.show(manifest | {"out": str(out)}, lines, as_json=common["as_json"])


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    rows = ", ".join(f"{count} {name}" for name, count in plan["rows"].items() if count)
    return [f"would {plan['command']} into {plan['out']}",
            f"  {plan['steps']} steps of {plan['batch']} rows; the data hold {rows} rows",
            f"  adapter about {options.size(plan['adapter_bytes'])} on disk; base {options.size(plan['base_bytes'])}",
            f"  about {options.size(plan['memory_bytes'])} of memory in float32, before activations"]


def _result_lines(manifest: dict[str, Any], out: Path, sparse: bool) -> list[str]:
    metrics = manifest["metrics"]
    names = {"task_loss": "train loss", "eval_loss": "held-out loss", "eval_rewards/accuracies": "held-out preference accuracy",
             "l1": "‖δ‖₁", "share_below_1e-5": "share below 1e-5", "share_zero": "share exactly zero",
             "l1_relative": "λ / rms entry gradient"}
    told = ", ".join(f"{label} {metrics[key]:.4g}" for key, label in names.items() if key in metrics)
    follow = f"paft sparsity-report {out}" if sparse else f"paft merge {out} OTHER_ADAPTER --method ties"
    return [f"{out}: {int(metrics['steps'])} steps in {manifest['wall_s']:.0f} s", *textwrap.wrap(told, 79), f"next: {follow}"]
