"""`paft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paft.cli import mergefile, options
from paft.errors import PaftError, UsageError

_ANSWERED = ("alpaca_out", "judge", "reward_model")


@click.command("eval")
@click.argument("candidates", nargs=-1, metavar="[MODEL|ADAPTER]...")
@click.option("--merge", "merges", multiple=True, metavar="RECIPE", help="A merge recipe, scored in memory; nothing is written.")
@click.option("--sft-data", metavar="DATA", help="Held-out instruction rows.")
@click.option("--pref-data", metavar="DATA", help="Held-out preference rows.")
@click.option("--text", metavar="DATA", help="Neutral text, to measure forgetting.")
@click.option("--base", metavar="MODEL", help="Base of the adapters and DPO reference  [default: what an adapter names].")
@click.option("--generate", metavar="TOKENS", type=click.IntRange(0), default=0, show_default=True,
              help="Score greedy answers of at most this length too.")
@click.option("--rows", metavar="NUMBER", type=click.IntRange(1), help="Use at most this many rows of each kind.")
@click.option("--beta", metavar="NUMBER", type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True,
              callback=options.finite,
              help="β of the DPO loss.")
@click.option("--batch-size", metavar="NUMBER", type=click.IntRange(1), default=16, show_default=True, help="Rows in one pass.")
@click.option("--tasks", metavar="NAME,...", help="Tasks of lm-evaluation-harness; leaderboard-v1 and -v2 are presets.")
@click.option("--shots", metavar="N", type=click.IntRange(0), help="Shots of every task  [default: the preset's or task's].")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Only the first rows of every task, for a trial.")
@click.option("--task-path", metavar="DIR", type=click.Path(path_type=Path), help="Your own task files (YAML).")
@click.option("--apply-chat-template", "chat", is_flag=True, help="Task prompts go through the chat template.")
@click.option("--prompts", metavar="DATA", help="What to answer  [default: the preference rows].")
@click.option("--alpaca-out", metavar="FILE", type=click.Path(path_type=Path),
              help="Write answers for AlpacaEval, FILE-CANDIDATE.json each.")
@click.option("--judge", metavar="MODULE:FUNCTION", help="Your f(answer, row) scores the answers.")
@click.option("--reward-model", metavar="NAME", help="A sequence classifier scores the answers.")
@click.option("--temperature", metavar="NUMBER", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="Of these answers; 0 is greedy.")
@options.common
def evaluate(candidates: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Score models, adapters and merges on held-out data.

    Both objectives, preference accuracy, forgetting, exact match of generated
    answers; named tasks; judged answers. The base is in memory once.

    \b
    paft eval adapters/sft adapters/dpo merges/ties --generate 16 \\
        --sft-data demo:sft:test --pref-data demo:pref:test --text demo:text:test
    paft eval adapters/sft --merge merges/mine.yaml --tasks leaderboard-v1
    paft eval adapters/dpo --tasks mine --task-path tasks/
    paft eval adapters/dpo --prompts eval.json --alpaca-out answers.json
    """
    answered = any(given[key] for key in _ANSWERED)
    if not (given["sft_data"] or given["pref_data"] or given["text"] or given["tasks"] or answered):
        raise UsageError("nothing to evaluate on", hint="pass --sft-data, --pref-data, --text, --tasks or --prompts")
    if not candidates and not given["merges"]:
        raise UsageError("nothing to evaluate", hint="name models or adapters, or --merge RECIPE")
    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.candidates import score

    measures = _measures(given, answered=answered)
    finished: list[dict[str, Any]] = []
    names = ("base", "sft_data", "pref_data", "text", "beta", "generate", "rows", "batch_size", "quiet", "chat")
    held = {key: given[key] for key in names}
    try:
        score(candidates, **held, merges=_merges(given["merges"]), measures=measures, done=finished.append)
    except PaftError:
        if finished:
            _show(finished, measures, as_json=as_json)
        raise
    _show(finished, measures, as_json=as_json)


def _merges(files: tuple[str, ...]) -> dict[str, Any]:
    """The recipes by the names of their files."""
    found: dict[str, Any] = {}
    for given in files:
        file = options.recipe_file(given)
        recipe = mergefile.read_recipe(file, (), (), {})[0]
        found[given if file is None or file.stem in found else file.stem] = recipe
    return found


def _measures(given: dict[str, Any], *, answered: bool) -> list[Any]:
    """What adds columns of its own, loaded before any model; ready to refuse."""
    found: list[Any] = []
    if given["tasks"]:
        from paft.tasks import Harness

        names = [name for name in given["tasks"].split(",") if name]
        found.append(Harness(names, shots=given["shots"], limit=given["limit"], path=given["task_path"], chat=given["chat"],
                             batch_size=given["batch_size"]))
    if answered:
        from paft.answers import TOKENS, Answers, Reward, load_judge, load_prompts

        source = given["prompts"] or given["pref_data"]
        if not source:
            raise UsageError("no prompts to answer", hint="pass --prompts DATA")
        judge = load_judge(given["judge"]) if given["judge"] else None
        reward = Reward(given["reward_model"], given["batch_size"]) if given["reward_model"] else None
        found.append(Answers(load_prompts(source)[: given["rows"]], given["alpaca_out"], judge, reward,
                             given["generate"] or TOKENS, given["temperature"], batch_size=given["batch_size"]))
    return found


def _show(rows: list[dict[str, Any]], measures: list[Any], *, as_json: bool) -> None:
    from paft.provenance import to_json
    from paft.report.headtohead import columns_of
    from paft.report.render import print_table

    if as_json:
        click.echo(to_json(rows), nl=False)
        return
    from rich.console import Console

    columns = columns_of(rows) + [column for measure in measures for column in measure.columns]
    print_table(Console(highlight=False), rows, columns, legend=True)
