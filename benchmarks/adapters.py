"""Adapters on real input: dense SFT, SFT at several λ with both solvers, and DPO, on one base; held-out loss, sparsity, size.

    python benchmarks/adapters.py MODEL --sft chat.jsonl --pref pairs.jsonl [--steps 15] [--rows 40] [-o benchmarks/adapters.json]

Every row is a `paft train-sft` or `paft train-dpo` on the same rows in the same order (one seed), LoRA r = 16, alpha = 32, on all
linear layers, batch 4 of up to 256 tokens, AdamW, cosine with 10 % warm-up, 2e-4 (SFT) and 5e-5 (DPO; a second one has 5e-6, the
same data in the same order: what the learning rate alone does to a delta). A tenth of the prompts is held out by hash, ``--rows``
of them are scored: cross-entropy per answer token for SFT, DPO's loss and accuracy for DPO. "base" is
the same command with a learning rate of 0. Rows that exist under ``--work`` are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from paft.data import hold_out, load_rows

LAMBDAS = ("1e-5", "1e-4")
SHARED = ("lora.r=16", "lora.alpha=32", "trainer.max_length=256", "trainer.per_device_train_batch_size=4",
          "trainer.per_device_eval_batch_size=4", "trainer.logging_steps=5", "trainer.save_strategy=no")


def stages() -> dict[str, tuple[str, list[str]]]:
    """name -> (command, its own options)."""
    found: dict[str, tuple[str, list[str]]] = {"base, SFT": ("train-sft", ["--set", "trainer.learning_rate=0"]),
                                               "SFT": ("train-sft", [])}
    for solver in ("subgradient", "proximal"):
        for lam in LAMBDAS:
            found[f"SFT, {solver}, λ = {lam}"] = ("train-sft", ["--l1", lam, "--l1-solver", solver])
    return {**found, "base, DPO": ("train-dpo", ["--set", "trainer.learning_rate=0"]), "DPO": ("train-dpo", []),
            "DPO, 5e-6": ("train-dpo", ["--set", "trainer.learning_rate=5e-6"])}


def split(source: Path, role: Any, rows: int, work: Path) -> tuple[Path, Path]:
    """Files of training rows and of ``rows`` held-out ones."""
    kept, held = hold_out(load_rows(str(source), role), 0.1)
    made = []
    for name, found in (("train", kept), ("held", held[:rows])):
        file = work / f"{role}-{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
        made.append(file)
    return made[0], made[1]


def train(name: str, options: argparse.Namespace, data: dict[str, tuple[Path, Path]]) -> Path:
    """Run a stage unless its adapter stands there."""
    command, own = stages()[name]
    out = options.work / re.sub(r"[^A-Za-z0-9.-]+", "-", name.replace("λ = ", ""))
    if (out / "paft.json").is_file():
        return out
    rate = "2e-4" if command == "train-sft" else "5e-5"
    steps = 1 if name.startswith("base") else options.steps
    sets = [f"trainer.learning_rate={rate}", f"trainer.max_steps={steps}", *SHARED]
    train_file, held = data[command]
    line = [sys.executable, "-m", "paft", command, "--model", str(options.model), "--data", str(train_file),
            "--eval-data", str(held), *(word for item in sets for word in ("--set", item)), *own, "-o", str(out)]
    print(name, flush=True)
    subprocess.run(line, check=True)
    return out


def row(name: str, adapter: Path) -> dict[str, Any]:
    """One line of the table, from the manifest and the sparsity report."""
    manifest = json.loads((adapter / "paft.json").read_text())
    said = subprocess.run([sys.executable, "-m", "paft", "sparsity-report", str(adapter), "--json"], check=True,
                          capture_output=True, text=True).stdout
    report, metrics = json.loads(said)[0], manifest["metrics"]
    overall = report["overall"]
    return {"adapter": name, "held-out loss": metrics["eval_loss"], "pref acc": metrics.get("eval_rewards/accuracies"),
            "share < 1e-5": overall["share_scaled"], "exact zeros": overall["zeros"] / overall["entries"],
            "N_eff/N": overall["n_eff"], "rms": overall["rms"], "λ / rms(G)": metrics.get("l1_relative"),
            "verdict": report["verdict"], "MB": (adapter / "adapter_model.safetensors").stat().st_size / 1e6}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    shown = {"held-out loss": ".4f", "pref acc": ".2f", "share < 1e-5": ".3f", "exact zeros": ".3f", "N_eff/N": ".2f",
             "rms": ".1e", "λ / rms(G)": ".2f", "verdict": "s", "MB": ".0f"}
    lines = ["| adapter | " + " | ".join(shown) + " |", "|---|" + "---:|" * len(shown)]
    for one in rows:
        cells = ["-" if one[key] is None else format(one[key], how) for key, how in shown.items()]
        lines.append(f"| {one['adapter']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--pref", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "paft-adapters")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = {"train-sft": split(options.sft, "sft", options.rows, options.work),
            "train-dpo": split(options.pref, "pref", options.rows, options.work)}
    rows = [row(name, train(name, options, data)) for name in stages()]
    record = {"model": options.model.name, "steps": options.steps, "rows": rows, "table": table(rows)}
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    command = f"python benchmarks/adapters.py {options.model.name} --sft {options.sft.name} --pref {options.pref.name}"
    text = f"`{command} --steps {options.steps} --rows {options.rows}`"
    options.out.with_suffix(".md").write_text("\n".join([text, "", *record["table"]]) + "\n")
    print("\n".join(record["table"]))


if __name__ == "__main__":
    main()
