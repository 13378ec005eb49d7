"""Time and memory of the reports on one adapter (or two), each command in a process of its own; and the report of real adapters.

    python benchmarks/report.py CHECKPOINT [--repeat 1] [-o benchmarks/report.json]
    python benchmarks/report.py --adapters A B ... [--meet A B ...] [-o benchmarks/smollm2]

CHECKPOINT holds sft/ and dpo/ (two LoRA adapters; `benchmarks/merge.py` has the same layout). The times are of whole commands,
imports included, kernels compiled before. With --adapters the sparsity report of all of them is written to OUT.html and OUT.json
(without its lists of tensors, which the page has), its figure to OUT.png, and the interference of each two in --meet to
OUT-interference.*.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PAFT = "from paft.cli import main; main()"
COMMANDS = {
    "sparsity-report": ["sparsity-report", "sft"],
    "sparsity-report --fast": ["sparsity-report", "sft", "--fast"],
    "interference": ["interference", "sft", "dpo"],
    "interference --fast": ["interference", "sft", "dpo", "--fast"],
}


def measure(line: list[str], checkpoint: Path) -> dict[str, float]:
    """Seconds of wall clock and CPU, and the largest resident set, of one command in ``checkpoint``."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", PAFT, *line, "--json", "-q"], cwd=checkpoint, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(line)} failed")
    return {"wall_s": time.monotonic() - started, "cpu_s": usage.ru_utime + usage.ru_stime, "rss_bytes": usage.ru_maxrss * 1024}


def timed(checkpoint: Path, repeat: int, out: Path) -> None:
    """Medians of ``repeat`` runs of every command, as a table on stdout and under the checkpoint's name in ``out``."""
    rows: list[dict[str, Any]] = []
    for name, line in COMMANDS.items():
        runs = [measure(line, checkpoint) for _ in range(repeat)]
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"command": name, **middle, "runs": [round(run["wall_s"], 2) for run in runs]})
        print(json.dumps(rows[-1]), file=sys.stderr)
    lines = ["| command | wall s | CPU s | peak RSS GB |", "|---|---:|---:|---:|"]
    lines += [f"| {row['command']} | {row['wall_s']:.1f} | {row['cpu_s']:.1f} | {row['rss_bytes'] / 1e9:.2f} |" for row in rows]
    print(f"{checkpoint.name}; {os.cpu_count()} cores\n\n" + "\n".join(lines))
    store = json.loads(out.read_text()) if out.is_file() else {}
    record = {"cores": os.cpu_count(), "machine": platform.machine(), "rows": rows, "table": lines}
    out.write_text(json.dumps({**store, checkpoint.name: record}, indent=1) + "\n")


def reported(adapters: list[str], meet: list[str] | None, out: Path) -> None:
    """The committed report: HTML, JSON and figure of ``adapters``, and of ``meet`` how each two meet."""
    jobs = [(["sparsity-report", *adapters], out)]
    if meet:
        jobs.append((["interference", *meet], out.with_name(f"{out.name}-interference")))
    for line, target in jobs:
        files = ["--html", str(target.with_suffix(".html")), "--plot", str(target.with_suffix(".png"))]
        done = subprocess.run([sys.executable, "-c", PAFT, *line, *files, "--json"], check=True, stdout=subprocess.PIPE)
        reports = [{key: value for key, value in report.items() if key != "tensors"} for report in json.loads(done.stdout)]
        for report in reports:
            if base := report.get("about", {}).get("base"):
                report["about"]["base"] = Path(base).name  # of a base in a directory, that of this machine
        target.with_suffix(".json").write_text(json.dumps(reports, indent=0, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--adapters", nargs="+")
    parser.add_argument("--meet", nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=None)
    options = parser.parse_args()
    if options.adapters:
        reported(options.adapters, options.meet, options.out or Path(__file__).with_name("smollm2"))
    elif options.checkpoint:
        timed(options.checkpoint, options.repeat, options.out or Path(__file__).with_suffix(".json"))
    else:
        parser.error("name a checkpoint, or --adapters")


if __name__ == "__main__":
    main()
