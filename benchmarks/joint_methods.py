"""Joint training on real input: every method at one budget of tokens, from one base, on the same rows.

    python benchmarks/joint_methods.py MODEL --sft chat.jsonl --pref pairs.jsonl [--tokens 5000] [--rows 12] [--work DIR]

Every row is a `paft train-joint` with one seed: LoRA r = 16, alpha = 32, on all linear layers, batch 4 of up to 192 tokens,
AdamW, 2e-4, cosine with 10 % warm-up, λ = 0.5; of the data the rows of at most 600 characters, so that few are cut. f* comes
from the two objectives alone at the same budget (--estimate-optima), which are rows too. A tenth of the prompts is held out by
hash, ``--rows`` of either kind are scored at the start, half way and at the end. Rows that exist under ``--work`` are kept.
Writes benchmarks/joint_methods.json, .md and .png, the last two as `paft compare` does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from paft.data import hold_out, load_rows

HERE = Path(__file__).parent
SETS = ("lora.r=16", "lora.alpha=32", "trainer.max_length=192", "trainer.per_device_train_batch_size=4",
        "trainer.per_device_eval_batch_size=4", "trainer.logging_steps=2", "trainer.save_strategy=no",
        "trainer.learning_rate=2e-4", "trainer.eval_steps=0.5")
METHODS = {
    "sequential-dpo-sft": ("sequential", "--order", "dpo-sft"), "sequential-sft-dpo": ("sequential", "--order", "sft-dpo"),
    "mix": ("mix",), "alright": ("alright",), "maxright": ("maxright", "--max-eval-steps", "5"),
    "uft": ("uft", "--beta", "0.1"), "dpo-sft-term": ("alright", "--lam", "1", "--loss", "sigmoid=1,sft=1"),
}


def split(source: Path, role: Any, options: argparse.Namespace) -> tuple[Path, Path]:
    """Files of training rows and of held-out ones, of those that are short."""
    short = [row for row in load_rows(str(source), role) if len(json.dumps([row[key] for key in row])) <= 600]
    kept, held = hold_out(short, 0.1)
    made = []
    for name, found in (("train", kept), ("held", held[:options.rows])):
        file = options.work / f"{role}-{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
        made.append(file)
    return made[0], made[1]


def paft(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "paft", *words], check=True)


def train(name: str, options: argparse.Namespace, data: dict[str, tuple[Path, Path]]) -> Path:
    """Run a method unless its adapter stands there."""
    out = options.work / name
    if (out / "paft.json").is_file():
        return out
    method, *own = METHODS[name]
    files = [word for role, flag in (("sft", "--sft"), ("pref", "--pref"))
             for word in (f"{flag}-data", str(data[role][0]), f"{flag}-eval-data", str(data[role][1]))]
    best = [] if name in ("uft", "dpo-sft-term") else ["--estimate-optima"]  # another loss has optima of its own
    print(name, flush=True)
    paft("train-joint", "-m", str(options.model), "--method", method, *files, "--max-tokens", str(options.tokens), *best, *own,
         *(f"--set={item}" for item in SETS), "-o", str(out))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--pref", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=5_000)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("adapters/joint-methods"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = {role: split(getattr(options, role), role, options) for role in ("sft", "pref")}
    made = [train(name, options, data) for name in METHODS]
    (alone,) = options.work.glob("optima-*")
    shown = [str(each) for each in (alone / "sft", alone / "dpo", *made)]
    for suffix in ("json", "markdown"):
        text = subprocess.run([sys.executable, "-m", "paft", "compare", *shown, f"--{suffix}"], check=True, capture_output=True,
                              text=True).stdout
        (HERE / f"joint_methods.{'md' if suffix == 'markdown' else suffix}").write_text(text)
    paft("compare", *shown, "--plot", str(HERE / "joint_methods.png"))


if __name__ == "__main__":
    main()
