"""`paft merge` and `paft methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.cli.delta import max_error_option, rank_option, result_lines
from paft.errors import UsageError
from paft.recipe import MergeRecipe, load


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
@click.option("--output-kind", type=click.Choice(["full", "lora", "delta"]), default="full", show_default=True,
              help="A whole model, an adapter, or the delta alone.")
@rank_option
@max_error_option
@options.recipe_option
@options.set_option("parameters.lambda=0.8")
@click.option("--seed", type=int, help="Seed of the random methods (DARE).")
@options.dry_run
@options.overwrite
@options.common
def merge(adapters: tuple[str, ...], **given: Any) -> None:
    """Merge adapters (or fine-tuned models) into their base.

    \b
    paft merge adapters/sft-l1 adapters/dpo --method ties -p density=0.5
    paft merge adapters/sft adapters/dpo --method task_arithmetic --weights 1,0.8
    paft merge adapters/sft adapters/dpo -c slerp --dry-run
    """
    file = options.recipe_file(given["file"])
    flags = {key: given[key] for key in ("method", "base", "dialect", "dtype", "seed")}
    flags |= {"adapters": list(adapters) or None, "weights": _weights(given["weights"])}
    for item in given["parameters"]:
        if not item.partition("=")[0] or "=" not in item:
            raise UsageError(f"-p {item!r} is not name=value", hint="for example -p density=0.5")
    recipe = load(MergeRecipe, file, (*given["sets"], *(f"parameters.{item}" for item in given["parameters"])), flags)
    if not recipe.adapters:
        raise UsageError("no adapters to merge", hint="paft merge ADAPTER ADAPTER --method ties -o DIR")
    out = given["out"] or Path("merges") / (file.stem if file else recipe.method)

    from paft.models import set_threads

    set_threads()
    from paft.merge import engine
    from paft.progress import Progress

    with Progress("merge", 1, quiet=given["quiet"] or given["dry_run"]) as bar:
        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar(done, name)

        report = engine.merge(
            recipe.adapters, base=recipe.base, method=recipe.method, parameters=recipe.parameters, weights=recipe.weights,
            out=out, dialect=recipe.dialect, dtype=recipe.dtype, seed=recipe.seed, output_kind=given["output_kind"],
            rank=given["rank"], max_error=given["max_error"], overwrite=given["overwrite"], dry_run=given["dry_run"],
            progress=progress,
        )
    lines = _plan_lines(report, out) if given["dry_run"] else _result_lines(report, out)
    options.show(report, lines, as_json=given["as_json"])


def _plan_lines(plan: dict[str, Any], out: Path) -> list[str]:
    return [f"would merge {len(plan['recipe']['adapters'])} inputs by {plan['recipe']['method']} into {out}",
            f"{plan['tensors']['merged']} tensors changed, {plan['tensors']['copied']} copied",
            f"reads {options.size(plan['bytes']['read'])}, writes {options.size(plan['bytes']['written'])}, "
            f"about {plan['seconds']:.0f} s and {options.size(plan['memory_bytes'])} of memory"]


def _result_lines(report: dict[str, Any], out: Path) -> list[str]:
    if report["output_kind"] != "full":
        return result_lines(report, out)
    count = report["tensors"]
    lines = [f"{out}: {count['merged']} tensors merged, {count['copied']} copied, {report['wall_s']:.1f} s"]
    kept = [f"{one['name']} {one['kept_share']:.0%}" for one in report["adapters"] if one.get("kept_share") is not None]
    if kept:
        lines.append("entries kept: " + ", ".join(kept)
                     + (f"; sign conflicts {report['sign_conflicts']:.0%}" if report.get("sign_conflicts") is not None else ""))
    if "rounding" in report:
        lost = report["rounding"]
        lines.append(f"rounding to the output dtype keeps {lost['entries_surviving']:.1%} of the changed entries")
    return [*lines, f"next: paft eval {out} --base BASE --sft-data ... --pref-data ..."]


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
