"""`paft delta`, and what `paft merge` says of the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paft.cli import options
from paft.store import Store

rank_option = click.option("--rank", type=click.IntRange(1), metavar="N", help="Rank of the adapter.")
max_error_option = click.option("--max-error", type=float, metavar="E",
                                help="Instead of a rank: its largest relative error, e.g. 0.05.")


@click.command()
@click.argument("source", metavar="ADAPTER|MODEL|DELTA")
@options.out_option
@click.option("--base", metavar="MODEL", help="The base  [default: what the input names].")
@click.option("--keep-largest", type=float, metavar="SHARE", help="Keep this share of each tensor, by magnitude.")
@click.option("--threshold", type=float, metavar="NUMBER", help="Keep entries of at least this magnitude.")
@click.option("--dtype", metavar="NAME", help="float32, bfloat16 or float16 values  [default: float32].")
@click.option("--to-lora", is_flag=True, help="A PEFT adapter instead of a delta file.")
@rank_option
@max_error_option
@click.option("--partial", is_flag=True, help="Leave out what an adapter cannot hold (norms, biases), as an error.")
@options.allow_base_mismatch
@options.dry_run
@options.overwrite
@options.common
def delta(source: str, **given: Any) -> None:
    """Write what an adapter or a model adds to its base.

    A delta file is exact, stored in the smallest form, and an input of `paft merge`.

    \b
    paft delta adapters/sft --keep-largest 0.1
    paft delta org/tuned --base org/base -o merges/tuned-delta
    paft delta org/tuned --base org/base --to-lora --rank 32 --partial
    """
    out = given["out"] or Path("merges") / f"{Path(source.partition('@')[0]).name}-{'lora' if given['to_lora'] else 'delta'}"

    from paft.models import set_threads

    set_threads()
    from paft.merge.extract import Prune, extract
    from paft.progress import Progress

    with Progress("delta", 1, quiet=given["quiet"] or given["dry_run"]) as bar:
        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar(done, name)

        keys = ("base", "dtype", "to_lora", "partial", "rank", "max_error", "allow_base_mismatch", "overwrite", "dry_run")
        prune = Prune(given["keep_largest"], given["threshold"])
        with options.making(out, overwrite=given["overwrite"], dry_run=given["dry_run"]) as place:
            report = extract(source, out=place, prune=prune, progress=progress, **{key: given[key] for key in keys})
    report |= {"out": str(out)} if "out" in report else {}
    options.show(report, _plan_lines(report, out) if given["dry_run"] else result_lines(report, out), as_json=given["as_json"])


def _plan_lines(plan: dict[str, Any], out: Path | Store) -> list[str]:
    what = "an adapter" if plan["recipe"].get("to_lora") else "a delta file"
    return [f"would write {plan['recipe']['input']} as {what} into {out}",
            f"{plan['tensors']['merged']} tensors, at most {options.size(plan['bytes']['written'])}"]


def result_lines(report: dict[str, Any], out: Path | Store) -> list[str]:
    """What an adapter or a delta file came to: bytes, what is kept, the error, the next command."""
    from paft.merge.outputs import delta_sentence, lora_sentence

    count, written, dense = report["tensors"], report["bytes"]["written"], report["bytes"]["dense"]
    lines = [f"{out}: {count['merged']} tensors"
             + (f", {count['unchanged']} unchanged left out" if count["unchanged"] else "")
             + f", {report['wall_s']:.1f} s"]
    if report["output_kind"] == "delta":
        forms = ", ".join(f"{number} {form}" for form, number in sorted(report["formats"].items()))
        return [*lines, f"{options.size(written)}, {written / dense:.1%} of a dense file ({forms})",
                delta_sentence(report), f"next: paft merge {out} --method task_arithmetic"]
    larger = "; larger than the delta itself: a delta file is exact" if written > dense else ""
    return [*lines, f"{options.size(written)}, rank {report['rank']}{larger}", *lora_sentence(report).split("\n"),
            f"next: paft merge {out} --method task_arithmetic"]
