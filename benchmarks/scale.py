"""The plan for 8B, 70B and 405B on paper: bytes, memory, network and time of every stage, from rates measured on a small machine.

    python benchmarks/scale.py [--write docs/scale.md]

Measured rates come from benchmarks/merge.json and report.json (an 8B checkpoint, two adapters of rank 16 on all linear layers,
2 cores): seconds of a core for each adapted weight. What this machine cannot measure is assumed, and named in `ASSUMED`. --write
puts the tables between the markers of a page; a test keeps the page and this script together.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RANK, TOKENS, MICRO, ACCUMULATED = 16, 10e6, 4096, 8  # of the adapters; of each data set; of a GPU's pass; passes a step
ASSUMED = {
    "gpu": (400e12, "FLOP/s of an 80 GB GPU: 40 % of an H100's bfloat16 peak"),
    "nvlink": (300e9, "bytes/s between the GPUs of a machine"),
    "ib": (40e9, "bytes/s between machines"),
    "disk": (2e9, "bytes/s of a local disk, reading and writing"),
    "share": (1e9, "bytes/s of a worker to a shared path or bucket"),
    "sha": (0.4e9, "bytes/s of sha256 on a core"),
    "cores": (16, "cores of a machine that merges; 8 of each of 4 workers"),
}
A = {name: value for name, (value, _) in ASSUMED.items()}


@dataclass(frozen=True)
class Model:
    """A Llama 3.1; ``gpus`` of 80 GB each for its training."""

    name: str
    hidden: int
    inner: int
    layers: int
    gpus: int
    kv: int = 1024
    vocabulary: int = 128256

    @property
    def shapes(self) -> list[tuple[int, int]]:
        h, f = self.hidden, self.inner
        return [(h, h), (self.kv, h), (self.kv, h), (h, h), (f, h), (f, h), (h, f)]

    @property
    def adapted(self) -> int:
        """Weights in the linear layers, which an adapter changes."""
        return self.layers * sum(m * n for m, n in self.shapes)

    @property
    def weights(self) -> int:
        return self.adapted + 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def bytes(self) -> int:
        return 2 * self.weights

    @property
    def factors(self) -> int:
        """Weights of one adapter."""
        return self.layers * sum(RANK * (m + n) for m, n in self.shapes)


MODELS = [Model("8B", 4096, 14336, 32, 1), Model("70B", 8192, 28672, 80, 8), Model("405B", 16384, 53248, 126, 32)]


def measured() -> dict[str, float]:
    """Core-seconds for each adapted weight (wall time times the cores that were there), and the memory of a merge."""
    merge = json.loads((HERE / "merge.json").read_text())["8b"]
    report = json.loads((HERE / "report.json").read_text())["8b"]
    paft = next(row for row in merge["rows"] if row["tool"] == "paft")
    size = MODELS[0].adapted
    found = {"merge": paft["wall_s"] * merge["cores"] / size, "rss": paft["rss_bytes"]}
    return found | {row["command"]: row["cpu_s"] / size for row in report["rows"] if "--fast" not in row["command"]}


def training(model: Model, reference: bool) -> list[str]:
    """One row: LoRA by FSDP2, bfloat16 base, float32 factors, activations computed again, `TOKENS` of data."""
    n, p, gpus = model.bytes, model.factors, model.gpus
    flop = (6 + 2 * reference) * model.weights  # a token: forward, back to the factors, forward again, and the reference's
    passes = TOKENS / (MICRO * gpus)
    gathered = (2 + reference) * n * (gpus - 1) / gpus  # into a GPU in one pass: forward, backward, reference
    reduced = 3 * 4 * p / ACCUMULATED  # the gradients of the factors, and the factors for an L1 term
    link = A["ib"] if gpus > 8 else A["nvlink"]
    compute, network = TOKENS * flop / (A["gpu"] * gpus), passes * (gathered + reduced * (gpus > 1)) / link
    logits = 2 * 4 * MICRO * model.vocabulary
    memory = (n + 16 * p) / gpus + 2 * MICRO * model.hidden * model.layers + logits + 2 * n / model.layers
    return [model.name, str(gpus), giga(memory), giga(n), giga(12 * p), giga(gathered), clock(compute), clock(network)]


def merging(model: Model, rate: dict[str, float]) -> list[str]:
    cores, entries = A["cores"], model.adapted
    compute, disk = rate["merge"] * entries / cores, 2 * model.bytes / A["disk"]
    spread, wire = rate["merge"] * entries / 32, 2 * model.bytes / (4 * A["share"])
    return [model.name, giga(model.bytes), giga(2 * 4 * model.factors), clock(rate["merge"] * entries / 2),
            clock(max(compute, disk)), "disk" if disk > compute else "cores",
            clock(max(spread, wire)), "network" if wire > spread else "cores"]


def measuring(model: Model, rate: dict[str, float]) -> list[str]:
    flop = 2 * model.weights * 1e6
    return [model.name, clock(model.bytes / A["share"]), clock(model.bytes / min(A["disk"], A["sha"] * A["cores"])),
            clock(rate["sparsity-report"] * model.adapted), clock(rate["interference"] * model.adapted),
            clock(flop / A["gpu"]), giga(model.bytes)]


def giga(count: float) -> str:
    return f"{count / 1e9:.2g}" if count < 1e10 else f"{count / 1e9:.0f}"


def clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(head: str, rows: list[list[str]]) -> list[str]:
    return [head, "|---" + "|---:" * (head.count("|") - 2) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def tables() -> str:
    """All of them, in markdown."""
    rate: dict[str, Any] = measured()
    train = "| model | GPUs | GB a GPU | GB of RAM to load | GB a checkpoint | GB gathered a pass | computing | gathering |"
    nano = {name: f"{1e9 * value:.1f}" for name, value in rate.items()}
    lines = ["Measured, in core-nanoseconds for each adapted weight: a merge by TIES",
             f"{nano['merge']} (and {rate['rss'] / 1e9:.2f} GB of memory at 8B), a sparsity report {nano['sparsity-report']},",
             f"an interference report {nano['interference']}.", "",
             "Assumed:", *(f"* {value:.2g} {what}" for value, what in ASSUMED.values()), "",
             f"SFT of one adapter, rank {RANK} on all linear layers, {TOKENS / 1e6:.0f} M tokens, {MICRO} a GPU and pass:", "",
             *table(train, [training(model, False) for model in MODELS]), "",
             "DPO, the same number of tokens; the base, adapter off, is the reference:", "",
             *table(train, [training(model, True) for model in MODELS]), "",
             "TIES of two adapters:", "",
             *table("| model | GB read and written, each | GB of adapters | 2 cores | one machine | limit | 4 workers | limit |",
                    [merging(model, rate) for model in MODELS]), "",
             "The rest; an evaluation of 1 M tokens on one GPU's time, had it the memory:", "",
             *table("| model | download | hash | sparsity report | interference | evaluation | GB it holds |",
                    [measuring(model, rate) for model in MODELS])]
    return "\n".join(lines)


BEGIN, END = "<!-- python benchmarks/scale.py --write docs/scale.md -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    page = parser.parse_args().write
    if page is None:
        print(tables())
        return
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
