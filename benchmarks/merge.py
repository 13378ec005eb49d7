"""Merge two LoRA adapters into a base: paft, mergekit, PEFT, and a plain copy as the floor, in one go on one machine.

    python benchmarks/merge.py CHECKPOINT [--tools paft mergekit ...] [--repeat 1] [-o benchmarks/merge.json]

CHECKPOINT holds base/, sft/ and dpo/ (two LoRA adapters on all linear layers). TIES, density 0.5, weights 1 and 1. Every tool
runs in a process of its own that ends when its output is on the disk (fsync); the floor is `cp -r` of the base and `sync`.
mergekit runs as its users run it (its LoRA cache in the base's dtype) and with a float32 cache; PEFT by `add_weighted_adapter`
("ties"), `merge_and_unload` and `save_pretrained`. The error is that of the merged delta W' - W against a float64 TIES of the
float64 factors, over a few tensors, so the final rounding to the base's dtype is part of it for everybody: "rounding alone" is
the error of the exact merge after that rounding. Tools take turns, and the medians of their runs are reported (a
tool that takes over a minute runs once); results are kept by the checkpoint's name in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TENSORS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj")
DENSITY = 0.5
ONCE = 60.0  # seconds from which a tool is not run again
PAFT = "from paft.cli import main; main()"
YAML = """
merge_method: ties
base_model: {base}
models:
  - model: {base}+{sft}
    parameters: {{weight: 1, density: {density}}}
  - model: {base}+{dpo}
    parameters: {{weight: 1, density: {density}}}
dtype: {dtype}
out_dtype: bfloat16
"""
MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
options = MergeOptions(lora_merge_cache=sys.argv[3], lora_merge_dtype=sys.argv[4] if sys.argv[4] != "default" else None,
                       copy_tokenizer=True, quiet=True)
run_merge(config, sys.argv[2], options)
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, sft, dpo, out = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sft, adapter_name="sft")
model.load_adapter(dpo, adapter_name="dpo")
model.add_weighted_adapter(["sft", "dpo"], [1.0, 1.0], "both", combination_type="ties", density=float(sys.argv[5]))
model.set_adapter("both")
model.merge_and_unload().save_pretrained(out)
"""


def command(tool: str, checkpoint: Path, work: Path) -> list[str]:
    """The command line of a tool; its output goes to work/out, its scratch files to work/scratch."""
    base, sft, dpo = (str(checkpoint / name) for name in ("base", "sft", "dpo"))
    out = str(work / "out")
    if tool == "copy":
        return ["cp", "-r", base, out]
    if tool == "paft":
        return [sys.executable, "-c", PAFT, "merge", sft, dpo, "--base", base, "--method", "ties", "-p", f"density={DENSITY}",
                "-o", out, "--quiet"]
    if tool == "peft":
        return [sys.executable, "-c", PEFT, base, sft, dpo, out, str(DENSITY)]
    precise = tool == "mergekit-float32"
    (work / "config.yml").write_text(YAML.format(base=base, sft=sft, dpo=dpo, density=DENSITY,
                                                 dtype="float32" if precise else "bfloat16"))
    return [sys.executable, "-c", MERGEKIT, str(work / "config.yml"), out, str(work / "scratch"),
            "float32" if precise else "default"]


def run(tool: str, checkpoint: Path, work: Path) -> dict[str, Any]:
    """One run: seconds (with the output synced), CPU seconds, peak resident bytes, most scratch bytes at one time."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    line = command(tool, checkpoint, work)
    os.sync()
    most, ended = [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(work / "scratch", most, ended))
    watch.start()
    started = time.monotonic()
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(work)})
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.monotonic() - started
    ended.set()
    watch.join()
    if status:
        sys.exit(f"{tool} failed: {told.decode()[-2000:]}")
    return {"tool": tool, "wall_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "rss_bytes": usage.ru_maxrss * 1024,
            "scratch_bytes": most[0]}


def _watch(folder: Path, most: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        try:
            most[0] = max(most[0], sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        except FileNotFoundError:
            continue


def errors(checkpoint: Path, out: Path) -> dict[str, float]:
    """Relative Frobenius error of the merged delta against float64, for the output and for the exact merge rounded once."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    factors = [load_file(checkpoint / name / "adapter_model.safetensors") for name in ("sft", "dpo")]
    configs = [json.loads((checkpoint / name / "adapter_config.json").read_text()) for name in ("sft", "dpo")]
    found, rounded, size = 0.0, 0.0, 0.0
    for module in TENSORS:
        deltas = []
        for tensors, config in zip(factors, configs, strict=True):
            a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
            deltas.append(config["lora_alpha"] / config["r"] * (b @ a))
        exact = ties(deltas)
        base, merged = (_tensor(folder, f"{module}.weight", safe_open) for folder in (checkpoint / "base", out))
        found += float((merged.double() - base.double() - exact).square().sum())
        rounded += float(((base.double() + exact).to(base.dtype).double() - base.double() - exact).square().sum())
        size += float(exact.square().sum())
    return {"error": (found / size) ** 0.5, "rounding_alone": (rounded / size) ** 0.5}


def apart(checkpoint: Path, out: Path) -> dict[str, float]:
    """`errors` in a process of its own: a child's peak memory counts that of the process which forked it."""
    line = [sys.executable, __file__, str(checkpoint), "--errors-of", str(out)]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def ties(deltas: list[Any]) -> Any:
    """TIES in float64 with unit weights: trim, elect, mean of what agrees."""
    import torch

    kept = []
    for delta in deltas:
        flat = delta.flatten().abs()
        kept.append(torch.where(delta.abs() >= flat.kthvalue(len(flat) - int(DENSITY * len(flat)) + 1).values, delta, 0))
    sign = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [torch.where(part.sign() == sign, part, 0) for part in kept]
    return sum(agree) / sum((part != 0).double() for part in agree).clamp(min=1)


def _tensor(folder: Path, name: str, safe_open: Any) -> Any:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dict
                return tensors.get_tensor(name)
    sys.exit(f"{folder} has no {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tools", nargs="+", default=["copy", "paft", "mergekit", "mergekit-float32", "peft"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--work", type=Path, default=None, help="where outputs are written, and removed")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--errors-of", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.errors_of:
        print(json.dumps(errors(options.checkpoint, options.errors_of)))
        return
    work = Path(tempfile.mkdtemp(prefix="paft-bench-", dir=options.work))
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in options.tools}
    try:
        for _ in range(options.repeat):
            for tool in options.tools:
                if runs[tool] and runs[tool][0]["wall_s"] > ONCE:
                    continue
                runs[tool].append(run(tool, options.checkpoint, work))
                if tool != "copy" and "error" not in runs[tool][0]:
                    runs[tool][0] |= apart(options.checkpoint, work / "out")
                print(json.dumps(runs[tool][-1]), file=sys.stderr)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(options.checkpoint, runs, options.out)


def report(checkpoint: Path, runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    rows = []
    for found in runs.values():
        middle = {key: statistics.median(one[key] for one in found) for key in ("wall_s", "cpu_s", "rss_bytes", "scratch_bytes")}
        rows.append({**found[0], **middle, "runs": [round(one["wall_s"], 2) for one in found]})
    floor = next((row["wall_s"] for row in rows if row["tool"] == "copy"), None)
    lines = [f"{checkpoint.name}: TIES, density {DENSITY}, two adapters; {os.cpu_count()} cores", "",
             "| tool | wall s | x copy | CPU s | peak RSS GB | scratch GB | error of the delta |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        error = f"{row['error']:.3g} (rounding alone {row['rounding_alone']:.3g})" if "error" in row else "-"
        ratio = f"{row['wall_s'] / floor:.1f}" if floor else "-"
        lines.append(f"| {row['tool']} | {row['wall_s']:.1f} | {ratio} | {row['cpu_s']:.1f} | {row['rss_bytes'] / 1e9:.2f} | "
                     f"{row['scratch_bytes'] / 1e9:.1f} | {error} |")
    print("\n".join(lines))
    record = {"checkpoint": checkpoint.name, "cores": os.cpu_count(), "machine": platform.machine(), "rows": rows,
              "table": lines[2:]}
    store = json.loads(out.read_text()) if out.is_file() else {}
    out.write_text(json.dumps({**store, checkpoint.name: record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
