"""The head-to-head on a real base: recipe.yaml over several seeds, then `paft compare`'s table and figure.

    python benchmarks/replication/replicate.py MODEL --sft chat.jsonl --pref pairs.jsonl --text neutral.txt [--eval DIR]
        [--seeds 3] [--work DIR] [--set KEY=VALUE ...]

Of both data sets the rows that fit into 128 tokens of MODEL; `paft run` cuts the splits, by a hash of the prompt. Text:
paragraphs of 200 to 500 characters. ``--eval`` holds hellaswag_val_1k.jsonl, piqa.jsonl, arc_easy.jsonl and truthfulqa_mc.jsonl
in their upstream schemas; the first ``--limit`` rows of each are asked, without shots. What is finished under ``--work`` is kept.
Writes smollm2.md, .json and .png beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from paft.data import load_rows
from paft.models import load_tokenizer
from paft.tokens import encode

HERE = Path(__file__).parent
LENGTH = 128
ASKED = "base sft dpo sft-dpo ties ties-l1".split()  # the rows that answer the tasks
TASKS = {
    "hellaswag": ("hellaswag_val_1k.jsonl", "{{ctx}}", "{{endings}}", "{{label}}", "acc_norm"),
    "piqa": ("piqa.jsonl", "{{query}}\nAnswer:", "{{choices}}", "{{gold}}", "acc_norm"),
    "arc_easy": ("arc_easy.jsonl", "{{query}}\nAnswer:", "{{choices}}", "{{gold}}", "acc_norm"),
    "truthfulqa_mc1": ("truthfulqa_mc.jsonl", "Q: {{question}}\nA:", "{{choices}}", "0", "acc"),
}


def short(source: Path, role: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows whose every answer fits, with its prompt, into the length that is trained."""
    sides = ("completion",) if role == "sft" else ("chosen", "rejected")
    return [row for row in load_rows(str(source), role)
            if max(len(encode(tokenizer, row, side)[0]) for side in sides) <= LENGTH]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(options: argparse.Namespace) -> None:
    """Data, text and task files under ``--work``."""
    tokenizer = load_tokenizer(options.model, chat=True)
    for role in ("sft", "pref"):
        write(options.work / f"{role}.jsonl", short(getattr(options, role), role, tokenizer))
    paragraphs = [line.strip() for line in options.text.read_text().splitlines()]
    write(options.work / "text.jsonl", [{"text": one} for one in paragraphs if 200 <= len(one) <= 500][:200])
    if options.eval:
        (options.work / "tasks").mkdir(exist_ok=True)
        for name, task in TASKS.items():
            task_file(options, name, *task)


def task_file(options: argparse.Namespace, name: str, file: str, text: str, choices: str, gold: str, metric: str) -> None:
    """A task of the harness over a local file; TruthfulQA's dictionary of answers becomes a list, the right one first."""
    rows = [json.loads(line) for line in (options.eval / file).read_text().splitlines()][:options.limit]
    for row in rows:
        if "mc1" in row:
            given = row.pop("mc1")
            row["choices"] = sorted(given, key=given.__getitem__, reverse=True)
            del row["mc2"]
    local = options.work / "tasks" / f"{name}.jsonl"
    write(local, rows)
    told = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(local.resolve())}},
            "output_type": "multiple_choice", "test_split": "test", "doc_to_text": text, "doc_to_choice": choices,
            "doc_to_target": gold, "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]}
    (options.work / "tasks" / f"{name}.yaml").write_text(json.dumps(told, indent=1))  # JSON is YAML


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--pref", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/out/replication"))
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options)
    tasks = {"names": list(TASKS), "path": str(options.work / "tasks"), "only": ASKED}
    asked = [f"evaluate.tasks={json.dumps(tasks)}"] if options.eval else []
    sets = [f"model={options.model}",
            *(f"data.{key}={options.work / key}.jsonl" for key in ("sft", "pref", "text")), *asked, *options.sets]
    out = options.work / "seeds"
    subprocess.run([sys.executable, "-m", "paft", "compare", str(HERE / "recipe.yaml"), "--seeds", str(options.seeds),
                    "-o", str(out), *(word for item in sets for word in ("--set", item))], check=True)
    for suffix in ("md", "png"):
        shutil.copyfile(out / f"compare.{suffix}", HERE / f"smollm2.{suffix}")
    text = (out / "compare.json").read_text(encoding="utf-8").replace(f"{options.work}/", "")
    (HERE / "smollm2.json").write_text(text.replace(options.model, Path(options.model).name), encoding="utf-8")


if __name__ == "__main__":
    main()
