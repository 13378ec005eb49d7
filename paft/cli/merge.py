"""`paft merge` and `paft methods`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paft.cli import mergefile, options
from paft.cli.delta import max_error_option, rank_option, result_lines
from paft.errors import UsageError
from paft.recipe import MergeRecipe
from paft.store import Store


@click.command()
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.option("--method", metavar="NAME", help="See `paft methods`  [default: ties].")
@click.option("-p", "parameters", multiple=True, metavar="NAME=VALUE",
              help="A parameter of the method; [a, b] gives one per adapter.")
@click.option("--weights", metavar="W,W,...", help="One weight per adapter  [default: 1 each].")
@options.out_option
@click.option("--base", metavar="MODEL", help="The base  [default: what the adapters name].")
@click.option("--dialect", metavar="NAME", help="mergekit, paper or peft, where they differ  [default: mergekit].")
@click.option("--dtype", metavar="NAME", help="float32, bfloat16 or float16  [default: the base's].")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]),
              help="stochastic: small deltas survive bfloat16 on average.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where deltas are computed.")
@click.option("--output-kind", type=click.Choice(["full", "lora", "delta"]), default="full", show_default=True,
              help="A whole model, an adapter, or the delta alone.")
@rank_option
@max_error_option
@options.recipe_option
@options.set_option("parameters.lambda=0.8")
@click.option("--seed", type=int, help="Seed of the random methods (DARE).")
@click.option("--engine", type=click.Choice(["paft", "mergekit"]), help="mergekit: its own methods, on exact float32 adapters.")
@click.option("--export-mergekit", "export", metavar="FILE", type=click.Path(path_type=Path),
              help="Write the merge as mergekit's YAML, and stop.")
@click.option("--check/--no-check", default=None, help="Load the merged model and look at its logits  [default: below 1 GB].")
@options.allow_base_mismatch
@options.executor
@click.option("--resume", is_flag=True, help="Take the files that a killed merge has finished; keep them at an interrupt.")
@options.dry_run
@options.overwrite
@options.common
def merge(adapters: tuple[str, ...], **given: Any) -> None:
    """Merge adapters (or fine-tuned models) into their base.

    \b
    paft merge adapters/sft-l1 adapters/dpo --method ties -p density=0.5
    paft merge adapters/sft adapters/dpo --method task_arithmetic --weights 1,0.8
    paft merge adapters/sft adapters/dpo -c slerp --dry-run
    paft merge -c mergekit-config.yml -o merges/mine

    RECIPE may be mergekit's YAML (models, slices of whole models, gradients).
    """
    file, executor = options.recipe_file(given["file"]), options.executor_of(given)
    flags = {key: given[key] for key in ("method", "base", "dialect", "dtype", "rounding", "seed", "engine")}
    flags |= {"adapters": list(adapters) or None, "weights": _weights(given["weights"])}
    for item in given["parameters"]:
        if not item.partition("=")[0] or "=" not in item:
            raise UsageError(f"-p {item!r} is not name=value", hint="for example -p density=0.5")
    recipe, document, notes = mergefile.read_recipe(file, given["sets"], given["parameters"], flags)
    if not recipe.adapters:
        raise UsageError("no adapters to merge", hint="paft merge ADAPTER ADAPTER --method ties -o DIR")
    out = given["out"] or Path("merges") / (file.stem if file else recipe.method)

    from paft.models import set_threads

    set_threads()
    from paft.progress import Progress, say

    for note in notes:
        say(f"note: {note}", quiet=given["quiet"])
    with mergefile.pointing_at(document):
        if given["export"]:
            lines = mergefile.export(recipe, given["output_kind"], given["export"], overwrite=given["overwrite"],
                                     allow_base_mismatch=given["allow_base_mismatch"])
            options.show({"out": str(given["export"])}, lines, as_json=given["as_json"])
            return
        with Progress("merge", 1, quiet=given["quiet"] or given["dry_run"]) as bar:
            def progress(done: int, total: int, name: str) -> None:
                bar.total = total
                bar(done, name)

            report = _merge(recipe, out, {**given, "executor": executor}, progress)
    lines = _plan_lines(report, out) if given["dry_run"] else _result_lines(report, out)
    options.show(report, lines, as_json=given["as_json"])


def _merge(recipe: MergeRecipe, out: Path | Store, given: dict[str, Any],
           progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Run the recipe's engine."""
    common = {"base": recipe.base, "method": recipe.method, "parameters": recipe.parameters, "weights": recipe.weights,
              "out": out, "dtype": recipe.dtype, "seed": recipe.seed, "overwrite": given["overwrite"],
              "dry_run": given["dry_run"], "allow_base_mismatch": given["allow_base_mismatch"], "progress": progress,
              "check": given["check"]}
    if recipe.engine == "mergekit":
        from paft.merge.mergekit import engine as backend

        for key, value, only in (("dialect", recipe.dialect, "mergekit"), ("rounding", recipe.rounding, "nearest"),
                                 ("device", given["device"], "cpu"), ("output-kind", given["output_kind"], "full")):
            if value != only:
                raise UsageError(f"--engine mergekit cannot do --{key} {value}", hint=f"leave it at {only}")
        if given["rank"] is not None or given["max_error"] is not None:
            raise UsageError("--engine mergekit writes whole models", hint="leave out --rank and --max-error")
        if given["resume"] or given["executor"].spreads:
            said = "--resume" if given["resume"] else "--executor ray"
            raise UsageError(f"--engine mergekit cannot {said}", hint="leave it out")
        with options.making(out, overwrite=given["overwrite"], dry_run=given["dry_run"]) as place:
            report = backend.merge(recipe.adapters, **{**common, "out": place})
        return report | ({"out": str(out)} if "out" in report else {})
    from paft.merge import engine

    return engine.merge(recipe.adapters, **common, dialect=recipe.dialect, output_kind=given["output_kind"],
                        device=given["device"], rounding=recipe.rounding, rank=given["rank"], max_error=given["max_error"],
                        resume=given["resume"], executor=given["executor"])


def _plan_lines(plan: dict[str, Any], out: Path | Store) -> list[str]:
    moved = plan["bytes"]
    cost = (f"reads {options.size(moved['read'])}, writes {options.size(moved['written'])}, "
            + (f"{options.size(moved['scratch'])} of scratch, " if "scratch" in moved else "")
            + f"about {plan['seconds']:.0f} s and {options.size(plan['memory_bytes'])} of memory")
    return [f"would merge {len(plan['recipe']['adapters'])} inputs by {plan['recipe']['method']} into {out}",
            *mergefile.profile_lines(plan["profile"]),
            f"{plan['tensors']['merged']} tensors changed, {plan['tensors']['copied']} copied",
            *textwrap.wrap(cost, 79)]


def _result_lines(report: dict[str, Any], out: Path | Store) -> list[str]:
    if report["output_kind"] != "full":
        return result_lines(report, out)
    count = report["tensors"]
    lines = [f"{out}: {count['merged']} tensors merged, {count['copied']} copied, {report['wall_s']:.1f} s"]
    kept = [f"{one['name']} {one['kept_share']:.0%}" for one in report["adapters"] if one.get("kept_share") is not None]
    if kept:
        kept[-1] += f"; sign conflicts {report['sign_conflicts']:.0%}" if report.get("sign_conflicts") is not None else ""
        lines += textwrap.wrap("entries kept: " + ", ".join(kept), 79, subsequent_indent="  ", break_long_words=False,
                               break_on_hyphens=False)
    if "rounding" in report:
        lost = report["rounding"]
        lines.append(f"rounding to the output dtype keeps {lost['entries_surviving']:.1%} of the changed entries")
    lines += ["checked: it loads, and its logits are finite"] if report.get("check") else []
    return [*lines, f"next: paft eval {out} \\", f"        --base {report['base']} \\", "        --sft-data ... --pref-data ..."]


def _weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r} is not a list of numbers", hint="for example --weights 1,0.5") from None


@click.command()
@click.argument("name", required=False)
@options.common
def methods(name: str | None, as_json: bool, **_: Any) -> None:
    """List the merge methods, or explain one.

    \b
    paft methods
    paft methods ties
    """
    from paft.merge.methods import describe, names

    found = [describe(one) for one in ([name] if name else names())]
    if name:
        lines = [*options.folded(found[0]["doc"]), "", *(f"  -p {key}={value}" for key, value in found[0]["parameters"].items())]
    else:
        lines = [*options.hang([(one["name"], one["summary"]) for one in found]), "", "next: paft methods ties"]
    options.show(found[0] if name else found, lines, as_json=as_json)
