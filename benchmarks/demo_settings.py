"""Choose the settings of merges/demo.yaml on the validation split.

    python benchmarks/demo_settings.py [-o DIR] [--model demo] [--seed 100]

Every row gets four settings: a learning rate for the second stage of a sequence, λ for Mix, λ or its L2 twin for the penalised
adapters, four parameter settings for each merge method. A merge with the L1 adapter may also bring that adapter, which the
penalty makes small, back to the norm of the dense one: 4 λ x 4 settings x 2 norms to choose from, thirty-two against the dense
merge's four, so the choice favours L1. The setting nearest to the ideal point on the *validation* split wins; one λ serves all
L1 merges. The seed is not one of those behind the README's table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paft.models import quiet_libraries

quiet_libraries()

from paft.catalog import find  # noqa: E402 - threads are set before torch loads
from paft.recipe import RunRecipe, validate  # noqa: E402
from paft.report.headtohead import ideal_distances  # noqa: E402
from paft.run import run  # noqa: E402
from paft.yamlfile import read_yaml  # noqa: E402

L1 = (1e-5, 3e-5, 1e-4, 3e-4)
TRAIN: dict[str, list[dict[str, Any]]] = {
    "sft-l1": [{"l1": value} for value in L1],
    "sft-l2": [{"l2": value} for value in (1e-3, 3e-3, 1e-2, 3e-2)],
    "sft-dpo": [{"trainer": {"learning_rate": value}} for value in (2e-3, 1e-3, 5e-4, 2e-4)],
    "dpo-sft": [{"trainer": {"learning_rate": value}} for value in (2e-3, 1e-3, 5e-4, 2e-4)],
    "dpo-sft-l1": [{"l1": value} for value in (3e-5, 1e-4, 3e-4, 1e-3)],
    "mix": [{"lam": value} for value in (0.3, 0.5, 0.7, 0.9)],
}
MERGE: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weights": weights} for weights in ([0.65, 0.35], [0.6, 0.4], [0.55, 0.45], [0.5, 0.5])],
    "task_arithmetic": [{"weights": weights} for weights in ([0.8, 0.8], [1.0, 0.8], [1.0, 1.0], [1.3, 0.8])],
    "ties": [{"parameters": {"density": d, "lambda": s}} for d in (0.2, 0.5) for s in (1.0, 1.5)],
    "slerp": [{"parameters": {"t": value}} for value in (0.45, 0.5, 0.55, 0.6)],
    "dare_linear": [{"parameters": {"density": d}, "weights": w} for d in (0.5, 0.9) for w in ([0.8, 0.8], [1.0, 1.0])],
    "dare_ties": [{"parameters": {"density": d}, "weights": w} for d in (0.5, 0.9) for w in ([0.8, 0.8], [1.0, 1.0])],
}


def variant(data: dict[str, Any], index: int) -> dict[str, Any]:
    """demo.yaml's data with each training at its setting number ``index``, and every setting of every merge."""
    chosen = json.loads(json.dumps(data))
    for name, settings in TRAIN.items():
        chosen["train"][name] |= settings[index]
    chosen["merge"] = {
        f"{method}{suffix}.{i}": {"of": [source, "dpo"], "method": method, **one}
        for suffix, source in (("", "sft"), ("-l1", "sft-l1")) for method, settings in MERGE.items()
        for i, one in enumerate(with_norms(settings) if suffix else settings) if suffix or index == 0
    }
    chosen["evaluate"]["split"] = "validation"
    return chosen


def with_norms(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return settings + [one | {"norm_like": "sft"} for one in settings]


def measured(recipe: str, variant: Callable[[dict[str, Any], int], dict[str, Any]]) -> dict[str, float]:
    """Ideal distance on the validation split of every row of the recipe's four variants, by row and variant: {"sft#0": ...}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path, default=Path(f"benchmarks/out/{recipe}_settings"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args()
    data = read_yaml(find(recipe)).data | {"model": options.model, "seed": options.seed}
    scores = {}
    for index in range(4):
        report = run(validate(RunRecipe, variant(data, index)), options.out / str(index), resume=True)
        scores |= {f"{row['id']}#{index}": row for row in report["rows"]}
    return ideal_distances(scores)


def best(distance: dict[str, float], keys: list[str], settings: list[dict[str, Any]]) -> str:
    """The setting with the least distance, and all of them."""
    told = ", ".join(f"{json.dumps(one)} {distance[key]:.2f}" for key, one in zip(keys, settings, strict=True))
    return f"{json.dumps(settings[min(range(len(keys)), key=lambda i: distance[keys[i]])])}   ({told})"


def main() -> None:
    distance = measured("demo", variant)
    for name in ("sft-dpo", "dpo-sft", "dpo-sft-l1", "mix"):
        print(f"{name:<20} {best(distance, [f'{name}#{k}' for k in range(4)], TRAIN[name])}")
    for method, settings in MERGE.items():
        print(f"{method:<20} {best(distance, [f'{method}.{i}#0' for i in range(4)], settings)}")
    mean = {k: statistics.mean(min(distance[f"{method}-l1.{i}#{k}"] for i in range(8)) for method in MERGE) for k in range(4)}
    chosen = min(mean, key=lambda k: mean[k])
    print(f"{'sft-l1':<20} l1 = {L1[chosen]:g}   ({', '.join(f'{L1[k]:g} {value:.2f}' for k, value in mean.items())})")
    for method, settings in MERGE.items():
        keys = [f"{method}-l1.{i}#{chosen}" for i in range(8)]
        print(f"{method + '-l1':<20} {best(distance, keys, with_norms(settings))}")
    print(f"{'sft-l2':<20} {json.dumps(TRAIN['sft-l2'][chosen])} has about its norm")


if __name__ == "__main__":
    main()
