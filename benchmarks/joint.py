"""What a step of joint training costs beside plain SFT and DPO steps: all of them in turns, step by step, in one process.

    python benchmarks/joint.py MODEL [--steps 31] [--batch 2] [--length 128] [--lam 0.5] [-o benchmarks/joint.json]

Every training is a `paft.train.stage.train` over one copy of the base, LoRA r = 16 on all linear layers, on rows that all have
``--length`` tokens; DPO's reference is asked in every step. A step is everything between two optimiser steps, the choice of the
objective and MAXRIGHT's looks at both (k = 10) included; the first step of each training is left out. CPU time of the process
(wall time on a GPU), since other work on the machine would drown a few per cent. A method is compared with plain steps in the
shares that it took itself: expected = share_DPO * t_DPO + share_SFT * t_SFT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

EXPECTED = {
    "alright": 1.00, "maxright": 1.08, "mix": 2.00,
    "reason": "ALRIGHT adds a coin and a lookup; MAXRIGHT one forward pass of each objective without a graph in ten steps: 3 "
              "forward passes of a batch beside about 4.3 x 10, the reference's being kept; Mix is both: twice the mean.",
}


def rows(length: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """``count`` pairs and answers that fill ``length`` tokens; so many that none is read twice, and the reference not before."""
    words = " ".join(f"word{i % 97}" for i in range(length))
    return {"sft": [{"prompt": f"Tell me {i}.", "completion": f" {words}"} for i in range(count)],
            "pref": [{"prompt": f"Ask {i}.", "chosen": f" yes {words}", "rejected": f" no {words}"} for i in range(count)]}


def recipes(model: str, options: argparse.Namespace) -> dict[str, Any]:
    from paft.recipe import DpoRecipe, JointRecipe, SftRecipe

    shared: dict[str, Any] = {"model": model, "trainer": {
        "max_steps": options.steps, "per_device_train_batch_size": options.batch, "max_length": options.length,
        "save_strategy": "no", "logging_steps": options.steps}}
    joint = {**shared, "lam": options.lam}
    return {"sft": SftRecipe(**shared), "dpo": DpoRecipe(**shared), "alright": JointRecipe(**joint, method="alright"),
            "maxright": JointRecipe(**joint, method="maxright", sft_opt=options.sft_opt, dpo_opt=0.0),
            "mix": JointRecipe(**joint, method="mix")}


class Timed:
    """Notes what a step took whenever its training passes the turn on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.started, self.seconds = clock, None, []

    def __call__(self, turn: Callable[[], None]) -> Callable[[], None]:
        def passing() -> None:
            if self.started is not None:
                self.seconds.append(self.clock() - self.started)
            turn()
            self.started = self.clock()

        return passing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lam", type=float, default=0.5)
    parser.add_argument("--sft-opt", type=float, default=2.0)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    from paft.models import quiet_libraries

    quiet_libraries()
    import torch

    from paft.train.interleave import Seat, interleave
    from paft.train.stage import start_model, train

    found, data = recipes(options.model, options), rows(options.length, options.steps * options.batch + 1)
    cuda = torch.cuda.is_available()
    timers = {name: Timed(time.perf_counter if cuda else time.process_time) for name in found}
    base = start_model(found["sft"])
    with tempfile.TemporaryDirectory() as scratch:
        def job(name: str) -> Callable[[Any], Any]:
            given = data if name not in ("sft", "dpo") else {"train": data["sft" if name == "sft" else "pref"], "eval": []}
            seat = partial(Seat, base)
            return lambda turn: train(found[name], Path(scratch) / name, rows=given, quiet=True, seat=seat(timers[name](turn)))

        manifests = dict(zip(found, interleave([job(name) for name in found]), strict=True))
    mean = {name: statistics.mean(timer.seconds) for name, timer in timers.items()}
    result: dict[str, Any] = {"model": Path(options.model).name, "steps": options.steps - 1, "batch": options.batch,
                              "length": options.length, "lam": options.lam, "unit": "s of wall time" if cuda else "s of CPU time",
                              "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
                              "expected": EXPECTED, "sft": mean["sft"], "dpo": mean["dpo"], "methods": {}}
    for name in ("alright", "maxright", "mix"):
        metrics = manifests[name]["metrics"]
        share = metrics["dpo_steps"] / (metrics["dpo_steps"] + metrics["sft_steps"])
        plain = share * mean["dpo"] + (1 - share) * mean["sft"]
        result["methods"][name] = {"seconds": mean[name], "dpo_share": share, "plain": plain, "ratio": mean[name] / plain}
        print(f"{name:<10} {mean[name]:7.2f} s a step, plain steps in these shares {plain:7.2f} s: {mean[name] / plain:.3f} x")
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
