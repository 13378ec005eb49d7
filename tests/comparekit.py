"""What trainings and runs leave behind, written by hand: logs, manifests and reports with the numbers that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datakit import write_jsonl

Point = tuple[float, float]
SAME_ROWS = {"sft": "a", "pref": "b", "sft_eval": "c", "pref_eval": "d"}


def training(place: Path, points: Sequence[Point], *, method: str = "alright", lam: float = 0.5, seed: int = 0,
             seconds: float = 10.0, tokens: int = 1000, memory: float = 500.0, chosen: str = "DS",
             optima: Mapping[str, Any] | None = None, inputs: Mapping[str, str] = SAME_ROWS, best_step: int | None = None,
             **recipe: Any) -> Path:
    """A joint training evaluated at ``points`` = [(f_SFT, f_DPO), ...], two steps apart; ``chosen`` since each evaluation."""
    place.mkdir(parents=True)
    last = len(points) - 1
    records: list[dict[str, Any]] = [{"step": 0, "loss": 3.0}]
    for index, (sft, dpo) in enumerate(points):
        records.append({"step": 2 * index, "eval_loss": lam * dpo + (1 - lam) * sft, "eval_sft_loss": sft, "eval_dpo_loss": dpo,
                        "eval_pref_accuracy": 0.5 + 0.1 * index, "seconds": seconds * index / max(last, 1),
                        "peak_memory_mb": memory, "tokens": tokens * index // max(last, 1), "chosen": chosen if index else ""})
    write_jsonl(place / "log.jsonl", records)
    said = {"method": method, "order": "dpo-sft", "lam": lam, "seed": seed, "beta": 0.1, "loss": {"sigmoid": 1.0}, **recipe}
    metrics = {"best_step": best_step} if best_step is not None else {}
    manifest(place, "train-joint", said, seed, inputs=inputs, metrics=metrics, optima=optima, wall_s=seconds + 5)
    return place


def alone(place: Path, command: str, measured: float, *, seed: int = 0, **recipe: Any) -> Path:
    """A training of one objective as TRL logs it."""
    place.mkdir(parents=True)
    found = {"step": 4, "eval_loss": measured, "eval_rewards/accuracies": 0.9, "num_tokens": 77.0}
    write_jsonl(place / "log.jsonl", [{"step": 2, "loss": 1.0, "num_tokens": 40.0}, found, {"step": 4, "train_runtime": 9.0}])
    manifest(place, command, {"seed": seed, **recipe}, seed, inputs={"train": "x", "eval": "c"}, metrics={}, wall_s=9.5)
    return place


def manifest(place: Path, command: str, recipe: Mapping[str, Any], seed: int | None, **more: Any) -> None:
    said = {"schema": 1, "command": command, "recipe": recipe, "seed": seed, "base": {"name": "m", "content_sha256": "base"},
            "content_sha256": "x", "peak_memory_mb": 400.0, **more}
    (place / "paft.json").write_text(json.dumps(said), encoding="utf-8")


PIPELINE: dict[str, Any] = {
    "name": "small", "model": "m",
    "train": {"sft": {"objective": "sft"}, "sft-l1": {"objective": "sft", "l1": 1e-3}, "dpo": {"objective": "dpo"},
              "sft-dpo": {"objective": "dpo", "on": "sft"}, "dpo-sft": {"objective": "sft", "on": "dpo"},
              "dpo-sft-l1": {"objective": "sft", "on": "dpo", "l1": 1e-3}, "mix": {"objective": "joint"}},
    "merge": {"ties": {"of": ["sft", "dpo"], "method": "ties"}, "ties-l1": {"of": ["sft-l1", "dpo"], "method": "ties"},
              "pruned": {"of": ["sft", "dpo"], "method": "ties", "density_like": "sft-l1"}},
}
GROUPS = {"base": "base", "sft": "single", "sft-l1": "single", "dpo": "single", "sft-dpo": "sequential", "dpo-sft": "sequential",
          "dpo-sft-l1": "sequential", "mix": "joint", "ties": "merge", "ties-l1": "merge", "pruned": "control"}
# (SFT loss, DPO loss, loss on neutral text) of seed 0
LOSSES = {"base": (9.0, 0.7, 1.0), "sft": (1.0, 3.0, 2.0), "sft-l1": (1.1, 2.5, 1.5), "dpo": (11.0, 0.2, 1.1),
          "sft-dpo": (1.5, 2.0, 2.2), "dpo-sft": (1.2, 1.0, 1.8), "dpo-sft-l1": (1.3, 0.8, 1.6), "mix": (1.1, 0.3, 1.9),
          "ties": (1.4, 1.1, 1.3), "ties-l1": (1.5, 0.9, 1.2), "pruned": (1.2, 1.6, 1.4)}


def run(place: Path, seed: int, losses: Mapping[str, Sequence[float]], recipe: Mapping[str, Any] = PIPELINE,
        names: Mapping[str, str] | None = None) -> Path:
    """A finished run: report.json with ideal distances, paft.json, and a manifest and log for each training."""
    from paft.report.headtohead import ideal_distances

    place.mkdir(parents=True)
    scores = {name: {"sft_loss": sft, "dpo_loss": dpo, "pref_accuracy": 1 / (1 + dpo), "text_loss": text}
              for name, (sft, dpo, text) in losses.items()}
    ideal = ideal_distances(scores)
    rows = [{"name": (names or {}).get(name, name), "id": name, "group": GROUPS[name], **score, "ideal": ideal[name]}
            for name, score in scores.items()]
    (place / "report.json").write_text(json.dumps({"schema": 1, "rows": rows}), encoding="utf-8")
    manifest(place, "run", {**recipe, "seed": seed}, seed)
    for index, name in enumerate(recipe["train"], 1):
        stage = place / "adapters" / name
        stage.mkdir(parents=True)
        write_jsonl(stage / "log.jsonl", [{"step": 3, "loss": 1.0, "num_tokens": 100.0 * index}])
        manifest(stage, "train-sft", {"seed": seed}, seed, metrics={}, wall_s=10.0 * index + seed)
    return place


def moved(seed: int, **more: Sequence[float]) -> dict[str, tuple[float, float, float]]:
    """`LOSSES` of another seed: every row moves by its own small amount, and those in ``more`` stand as given."""
    found = {}
    for index, (name, values) in enumerate(LOSSES.items()):
        shift = 0.0 if name == "base" else 0.01 * ((seed * (index + 3)) % 7)
        sft, dpo, text = more.get(name.replace("-", "_"), values)
        found[name] = (sft + shift, dpo + 2 * shift, text - shift / 2)
    return found
