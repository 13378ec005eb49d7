"""Choose the settings of merges/demo.yaml on the validation split, with the same tuning budget for every row.

    python benchmarks/demo_settings.py [-o DIR] [--model demo] [--seed 100]

Each row gets four settings; the one nearest to the ideal point (held-out SFT and DPO loss, `paft.report.headtohead`) on the
*validation* split wins. The seed is not one of those that the README's table is made with. Prints one line a row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from paft.models import quiet_libraries

quiet_libraries()

from paft.recipe import RunRecipe, find, validate  # noqa: E402 - threads are set before torch loads
from paft.report.headtohead import ideal_distances  # noqa: E402
from paft.run import run  # noqa: E402
from paft.yamlfile import read_yaml  # noqa: E402

# Four settings a row. Sequential and joint rows are tuned too: the second stage's learning rate, Mix's λ.
TRAIN = {
    "sft-l1": [{"l1": value} for value in (1e-5, 3e-5, 1e-4, 3e-4)],
    "sft-l2": [{"l2": value} for value in (1e-3, 3e-3, 1e-2, 3e-2)],
    "sft-dpo": [{"trainer": {"learning_rate": value}} for value in (2e-3, 1e-3, 5e-4, 2e-4)],
    "dpo-sft": [{"trainer": {"learning_rate": value}} for value in (2e-3, 1e-3, 5e-4, 2e-4)],
    "dpo-sft-l1": [{"l1": value} for value in (3e-5, 1e-4, 3e-4, 1e-3)],
    "mix": [{"lam": value} for value in (0.3, 0.5, 0.7, 0.9)],
}
DENSITY = [{"parameters": {"density": value}} for value in (0.3, 0.5, 0.7, 0.9)]
SCALE = [{"weights": [value, value]} for value in (0.6, 0.8, 1.0, 1.2)]
MERGE = {
    "linear": [{"weights": [1 - value, value]} for value in (0.3, 0.4, 0.5, 0.6)],
    "slerp": [{"parameters": {"t": value}} for value in (0.3, 0.4, 0.5, 0.6)],
    "task_arithmetic": SCALE, "ties": DENSITY, "dare_linear": DENSITY, "dare_ties": DENSITY,
}


def variant(data: dict, index: int) -> dict:
    """demo.yaml's data with every row at its setting number ``index``."""
    chosen = json.loads(json.dumps(data))
    for name, settings in TRAIN.items():
        chosen["train"][name] |= settings[index]
    for name, entry in chosen["merge"].items():
        entry |= MERGE.get(name.removesuffix("-l1"), [{}] * 4)[index]
    chosen["evaluate"]["split"] = "validation"
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/out/demo_settings"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args()
    data = read_yaml(find("demo")).data | {"model": options.model, "seed": options.seed}
    scores = {}
    for index in range(4):
        recipe = validate(RunRecipe, variant(data, index))
        report = run(recipe, options.out / str(index), resume=True)
        scores |= {f"{row['id']}#{index}": row for row in report["rows"]}
    distance = ideal_distances(scores)
    settings = TRAIN | {name: MERGE.get(name.removesuffix("-l1"), []) for name in data["merge"]}
    for name, given in settings.items():
        if given:
            told = ", ".join(f"{json.dumps(one)} {distance[f'{name}#{i}']:.3f}" for i, one in enumerate(given))
            best = min(range(4), key=lambda i, name=name: distance[f"{name}#{i}"])
            print(f"{name:<20} best {json.dumps(given[best])}   ({told})")


if __name__ == "__main__":
    main()
