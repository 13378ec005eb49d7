"""What Ray costs and gains on this machine: `paft run demo` by the local executor and by Ray, and whether stages overlap.

    python benchmarks/on_ray.py [-o DIR] [--steps 60] [--workers 2]

Both run the demo's recipe with ``--steps`` a training, ``--workers`` at once, one core each. Overlap is the sum of the seconds of
all trainings over the seconds from the first one's start to the last one's end: 1 is one after the other. Ray's own start and
its workers' imports are in its wall time. Says whether the artefacts are the same, byte for byte. Writes benchmarks/on_ray.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def timed(out: Path, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Run the demo into ``out``; its wall time, and how much its trainings overlap."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.time()
    steps = [f"--set=defaults.{kind}.trainer.max_steps={options.steps}" for kind in ("sft", "dpo", "joint")]
    line = ["paft", "run", "demo", "-o", str(out), "-q", "--json", *steps, "--workers", str(options.workers), *more]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *line], check=True, stdout=subprocess.DEVNULL, env=one)
    wall = time.time() - started
    trained = {file: json.loads(file.read_text())["wall_s"] for file in out.glob("adapters/*/paft.json")}
    ends = {file: file.stat().st_mtime for file in trained}
    span = max(ends.values()) - min(ends[file] - spent for file, spent in trained.items())
    return {"wall_s": round(wall, 1), "trainings_s": round(sum(trained.values()), 1), "span_s": round(span, 1),
            "overlap": round(sum(trained.values()) / span, 2)}


def tensors(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("merges/bench-ray"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    local, there = options.out / "local", options.out / "ray"
    found: dict[str, Any] = {"steps": options.steps, "workers": options.workers, "local": timed(local, options)}
    found["ray"] = timed(there, options, "--executor", "ray", "--address", "local")
    found["same_bytes"] = tensors(local) == tensors(there)
    (HERE / "on_ray.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
