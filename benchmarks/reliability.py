"""What happens when things go wrong, counted: kill -9, faults of the machine, hostile inputs, little memory.

    python benchmarks/reliability.py [--kills 200] [--inputs 100000] [--seed 0] [--only kills faults inputs memory]

`make soak` runs the long form; the tests run a short one of each (tests/test_fuzz.py, tests/test_kills.py). Writes
benchmarks/reliability.json and .md, part by part; exits 1 on any fault, with the seed by which an input can be made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import faults
import fuzz
import kills

HERE = Path(__file__).resolve().parent
SHARES = {"train-sft": 0.25, "train-dpo": 0.2, "merge": 0.35, "run": 0.2}  # of the kills
BLOCK = 500  # inputs that one process reads, so that a crash of the interpreter names few
MEMORY = 1_500_000_000
LAYERS, HIDDEN, INNER, KEYS, VOCABULARY, RANK = 22, 2048, 5632, 256, 32000, 16  # TinyLlama's, 1.1B
LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({limit},) * 2); from paft.cli import main; main()"


def killed(count: int, seed: int) -> dict[str, Any]:
    """kill -9, ``count`` times in all."""
    with tempfile.TemporaryDirectory(dir=_fast()) as room:
        kills.preload()
        world = kills.make_world(Path(room) / "world")
        found = kills.soak(world, {name: max(1, round(share * count)) for name, share in SHARES.items()}, seed)
    return {name: {"kills": t.kills, "while it ran": t.before, "resumed": t.outcomes["same"], "faults": t.faults}
            for name, t in found.items()}


def faulty(scale: float, seed: int) -> dict[str, Any]:
    """Faults of the machine; on a real disk, since a bind mount of it is made."""
    with tempfile.TemporaryDirectory() as room:
        os.chmod(room, 0o755)
        kills.preload()
        found = faults.run(kills.make_world(Path(room) / "world"), seed, scale)
    return {name: {"cases": t.kills, "outcomes": dict(t.outcomes), "faults": t.faults} for name, t in found.items()}


def fuzzed(count: int, seed: int) -> dict[str, Any]:
    """Hostile inputs, in processes of their own with 1 GB more than the libraries take."""
    total = sum(share for *_, share in fuzz.KINDS.values())
    table = {}
    for kind, (*_, share) in fuzz.KINDS.items():
        table[kind] = all_of(kind, max(1, round(count * share / total)), seed * 10**7)
        print(kind, table[kind], flush=True)
    return table


def all_of(kind: str, inputs: int, first: int) -> dict[str, Any]:
    """``inputs`` of one kind, a process for every `BLOCK`."""
    fuzz.warm_up()
    outcomes: Counter[str] = Counter()
    found, done, slowest, started = [], 0, 0.0, time.monotonic()
    while done < inputs:
        block = min(BLOCK, inputs - done)
        receive, send = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=read_block, args=(kind, first + done, block, send))
        child.start()
        send.close()
        try:
            part = receive.recv()
        except EOFError:
            part = fuzz.Count(inputs=block, faults=[f"{kind} {first + done}..: the process died"])
        child.join()
        outcomes += part.outcomes
        found, done, slowest = found + part.faults, done + block, max(slowest, part.slowest)
    return {"inputs": done, "outcomes": dict(outcomes), "slowest_s": round(slowest, 2),
            "seconds": round(time.monotonic() - started), "faults": found}


def read_block(kind: str, first: int, count: int, send: Any) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**9,) * 2)
    found = fuzz.Count()
    for seed in range(first, first + count):
        fuzz.one(kind, seed, found, keep=Path(tempfile.gettempdir()) / "paft-faults")
    send.send(found)


def memory() -> dict[str, Any]:
    """A merge of the 1.1B shape, 2.2 GB in bfloat16, in a process that may address 1.5 GB."""
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        make_checkpoint(room)
        rows = {}
        for method in ("ties", "dare_ties"):
            command = ["merge", str(room / "one"), str(room / "two"), "--base", str(room / "base"), "--method", method, "-p",
                       "density=0.5", "-o", str(room / "out"), "-q", "--json"]
            started = time.monotonic()
            done = subprocess.run([sys.executable, "-c", LIMITED.format(limit=MEMORY), *command], capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            good = done.returncode == 0
            peak = json.loads((room / "out" / "paft.json").read_text())["peak_memory_mb"] if good else None
            rows[method] = {"exit": done.returncode, "seconds": round(time.monotonic() - started, 1), "peak_memory_mb": peak,
                            "faults": [] if good else [done.stderr[-300:]]}
            shutil.rmtree(room / "out", ignore_errors=True)
    return rows


def make_checkpoint(room: Path) -> None:
    """A base of TinyLlama's shape and two adapters of rank 16, with values of a trained model's size."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    linear = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
              "mlp.down_proj": (HIDDEN, INNER)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in linear.items()}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.02).bfloat16()
    (room / "base").mkdir()
    save_file(weights, room / "base" / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    (room / "base" / "config.json").write_text(json.dumps(config))
    for name in ("one", "two"):
        (room / name).mkdir()
        factors = {f"base_model.model.{module}.lora_{side}.weight": torch.randn(shape, generator=generator).mul_(0.01)
                   for module, (rows, columns) in shapes.items() for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK)))}
        save_file(factors, room / name / "adapter_model.safetensors")
        options = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [each.split(".")[1] for each in linear]}
        (room / name / "adapter_config.json").write_text(json.dumps(options))


def table(found: dict[str, Any]) -> str:
    """The counts as Markdown."""
    lines = ["# Reliability", "", "Made by `make soak`. A fault is anything else than what is said.", ""]
    parts = {
        "kills": ("kill -9 at random moments", "Nothing half-made is taken for complete; the same command again (`--resume`) "
                  "gives the bytes of an undisturbed one, and leaves nothing beside them."),
        "faults": ("Faults of the machine", "Exit 4 or 5 with one line, the old target untouched, nothing half-made "
                   "(exit 0: the fault came too late)."),
        "inputs": ("Hostile inputs", "Taken, or refused in one line with exit 2 to 5; at most 5 s and 1 GB; nothing written."),
        "memory": ("A merge of the 1.1B shape within 1.5 GB of address space", "2.2 GB of bfloat16, two adapters of rank 16."),
    }
    for part, (title, law) in parts.items():
        if part not in found:
            continue
        rows = found[part]["rows"]
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines += [f"## {title}", "", law, "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(_cell(row[key]) for key in columns) + " |" for name, row in rows.items()]
        lines += ["", f"{found[part]['when']}, {found[part]['machine']}: {found[part]['minutes']:.0f} min.", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {key}" for key, count in sorted(value.items()))
    return str(len(value)) if isinstance(value, list) else str(value)


def _fast() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["kills", "faults", "inputs", "memory"],
                        default=["memory", "inputs", "faults", "kills"])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "reliability.json")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    parts = {"kills": lambda: killed(given.kills, given.seed), "faults": lambda: faulty(1.0, given.seed),
             "inputs": lambda: fuzzed(given.inputs, given.seed), "memory": memory}
    found = json.loads(given.out.read_text()) if given.out.is_file() else {}
    bad = []
    for part in given.only:
        started = time.monotonic()
        rows = parts[part]()
        found[part] = {"rows": rows, "minutes": round((time.monotonic() - started) / 60, 1), "when": time.strftime("%Y-%m-%d"),
                       "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"}
        bad += [fault for row in rows.values() for fault in row["faults"]]
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(table(found))
    for fault in bad[:20]:
        print(fault, file=sys.stderr)
    print(table(found))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
