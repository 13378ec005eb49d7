"""Choose the settings of merges/compare.yaml on the validation split: four for each row that has any.

    python benchmarks/compare_settings.py [-o DIR] [--model demo] [--seed 100] > benchmarks/compare_settings.txt

Trainings are varied together, setting number k of each in pipeline k. A merge has four settings of its own; with the L1 or the
proximal adapter it may also bring that adapter, which the penalty makes small, back to the norm of the dense one. Of their four
λ the one is taken that serves the six merges best in the mean, so the choice favours the penalised merges: 4 λ x 4 settings
x 2 norms against the dense merge's four. The setting nearest to the ideal point on the *validation* split wins. The controls
take the settings of the L1 merges that they control. The seed is not one of those behind the table.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from demo_settings import MERGE, best, measured, with_norms

LAMBDAS = (1e-5, 3e-5, 1e-4, 3e-4)
RATES = [{"trainer": {"learning_rate": value}} for value in (2e-3, 1e-3, 5e-4, 2e-4)]
SHARES = [{"lam": value} for value in (0.3, 0.5, 0.7, 0.9)]
TRAIN: dict[str, list[dict[str, Any]]] = {
    "sft-l1": [{"l1": value} for value in LAMBDAS],
    "sft-prox": [{"l1": value} for value in LAMBDAS],
    "sft-l2": [{"l2": value} for value in (1e-3, 3e-3, 1e-2, 3e-2)],
    "dpo-sft-term": [{"loss": {"sigmoid": 1.0, "sft": value}} for value in (0.03, 0.1, 0.3, 1.0)],
    "orpo": [{"beta": value} for value in (0.03, 0.1, 0.3, 1.0)],
    "sft-dpo": RATES,
    "dpo-sft": RATES,
    "dpo-sft-l1": [{"l1": value} for value in (3e-5, 1e-4, 3e-4, 1e-3)],
    "sequential": [{"order": order, **rate} for order in ("dpo-sft", "sft-dpo") for rate in RATES[:2]],
    "mix": SHARES, "alright": SHARES, "maxright": SHARES,
    "uft": [{"uft_loss": loss, "trainer": {"per_device_train_batch_size": 64, "learning_rate": rate}}
            for loss in ("mse", "bce") for rate in (2e-3, 6e-3)],
}
PENALISED = {"l1": "sft-l1", "prox": "sft-prox"}
ALONE = [name for name in TRAIN if name not in ("sft-l1", "sft-prox", "sft-l2")]


def variant(data: dict[str, Any], index: int) -> dict[str, Any]:
    """compare.yaml's data with each training at its setting number ``index``, and every setting of every merge."""
    chosen = json.loads(json.dumps(data))
    for name, settings in TRAIN.items():
        own = settings[index]
        trainer = {**chosen["train"][name].get("trainer", {}), **own.get("trainer", {})}
        chosen["train"][name] |= own | ({"trainer": trainer} if trainer else {})
    chosen["merge"] = {
        f"{method}{suffix}.{i}": {"of": [source, "dpo"], "method": method, **one}
        for suffix, source in {"": "sft", **{f"-{name}": source for name, source in PENALISED.items()}}.items()
        for method, settings in MERGE.items()
        for i, one in enumerate(with_norms(settings) if suffix else settings) if suffix or index == 0
    }
    chosen["evaluate"]["split"] = "validation"
    return chosen


def main() -> None:
    distance = measured("compare", variant)
    for name in ALONE:
        print(f"{name:<24} {best(distance, [f'{name}#{k}' for k in range(4)], TRAIN[name])}")
    for method, settings in MERGE.items():
        print(f"{method:<24} {best(distance, [f'{method}.{i}#0' for i in range(4)], settings)}")
    for name, source in PENALISED.items():
        nearest = [[min(distance[f"{method}-{name}.{i}#{k}"] for i in range(8)) for method in MERGE] for k in range(4)]
        mean = [statistics.mean(each) for each in nearest]
        chosen = min(range(4), key=mean.__getitem__)
        told = ", ".join(f"{LAMBDAS[k]:g} {value:.2f}" for k, value in enumerate(mean))
        print(f"{source:<24} l1 = {LAMBDAS[chosen]:g}   ({told})")
        for method, settings in MERGE.items():
            keys = [f"{method}-{name}.{i}#{chosen}" for i in range(8)]
            print(f"{method + '-' + name:<24} {best(distance, keys, with_norms(settings))}")


if __name__ == "__main__":
    main()
