"""A delta as a LoRA adapter: exact where it is a sum of products, else a truncated SVD with its error.

    ΔW = B A with scale 1 (alpha = r) in every module, float32

Linear methods over LoRA adapters (linear, task arithmetic, delta-space SLERP) give rank Σr, exactly, also for unequal
ranks; `Budget` cuts them by a small SVD. The result of TIES, DARE and their kin, and the delta of a fine-tuned model,
are cut by `lowrank`. Modules that do not change are left out; what LoRA cannot hold (norms, biases, a tied embedding) is
refused by name, if it changes. PEFT's ``add_weighted_adapter`` needs equal ranks or dense SVDs and tells no error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paft.adapter import CONFIG, WEIGHTS, Adapter
from paft.errors import MismatchError, UsageError
from paft.hub import split_revision
from paft.merge.deltas import NOTHING, Source
from paft.merge.lowrank import Budget, low_rank
from paft.merge.ops import tiles, total
from paft.merge.places import Place, find_places
from paft.merge.tensorfile import TensorFile, header_room

# What the first adapter's configuration still says rightly of the sum; everything else is PEFT's default.
_KEPT = ("task_type", "base_model_name_or_path", "revision")
_TARGETS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")


def check_lora(source: Source, budget: Budget | None) -> dict[str, Place]:
    """The module of every tensor that can be an adapter's; nothing is written.

    Raises UsageError where a budget is needed, MismatchError for a tensor that changes but that LoRA cannot hold.
    """
    places = find_places(source.base, source.names, source.deltas)
    for name in source.names:
        place = places.get(name)
        if place is not None and place.why_not is None:
            if budget is None and source.products(name) is None:
                raise UsageError(
                    f"this delta is not of low rank ({name})", hint="give --rank N or --max-error E, or use --output-kind full"
                )
        elif not source.partial and any(bool(tile.any()) for _, tile in tiles(source.tensor(name))):
            why = place.why_not if place else "no linear layer or embedding that transformers knows"
            raise MismatchError(
                f"LoRA cannot hold the change of {name}: {why}",
                hint="a delta file or a full model holds it; `paft delta --to-lora --partial` leaves it out and counts the error",
            )
    return {name: place for name, place in places.items() if place.why_not is None}


def write_lora(
    source: Source, out: Path, *, budget: Budget | None, seed: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write the delta as an adapter that ``PeftModel.from_pretrained`` loads, and return a report.

    The report has the ``rank`` of most modules, and of each tensor and of all the relative error ‖ΔW - BA‖ / ‖ΔW‖;
    ``left_out`` are tensors that change but that LoRA cannot hold, all of them error (with `Source.partial`). Raises as
    `check_lora`, and MismatchError for a delta that is zero everywhere.
    """
    places = check_lora(source, budget)
    ranks: dict[str, int] = {}
    tensors: dict[str, dict[str, Any]] = {}
    energy, lost, left_out, dense = [], [], [], 0
    room = header_room([f"base_model.model.{place.module}.lora_embedding_A" for place in places.values() for _ in range(2)])
    with TensorFile(out / WEIGHTS, room) as file:
        for name in source.names:
            tensor = source.tensor(name)
            found = low_rank(name, tensor, budget, seed) if name in places else None
            progress(name)
            if name not in places and (square := total(tensor, lambda tile, start: tile.double().square())):
                left_out.append(name)
                energy.append(square)
                lost.append(square)
            if found is None:
                continue
            for key, factor in places[name].factors(found.left, found.right).items():
                file.add(key, factor)
            ranks[places[name].module] = found.rank
            tensors[name] = {"rank": found.rank, "relative_error": found.lost / found.norm}
            energy.append(found.norm**2)
            lost.append(found.lost**2)
            dense += 4 * tensor.rows * tensor.columns
    if not tensors:
        raise MismatchError(NOTHING, hint="the base is the result")
    transposed = any(place.kind == "Conv1D" for name, place in places.items() if name in tensors)
    config = _config(source, ranks, transposed=transposed)
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {
        "rank": config["r"],
        "exact": not any(lost),
        "relative_error": math.sqrt(math.fsum(lost) / math.fsum(energy)),
        "merged_norm": math.sqrt(math.fsum(energy)),
        "modules": tensors,
        "left_out": left_out,
        "tensors": {"merged": len(tensors), "unchanged": len(source.names) - len(tensors) - len(left_out)},
        "bytes": {"written": file.position, "dense": dense},
    }


def _config(source: Source, ranks: dict[str, int], *, transposed: bool) -> dict[str, Any]:
    common = Counter(ranks.values()).most_common(1)[0][0]
    odd = {module: rank for module, rank in ranks.items() if rank != common}
    first = source.adapters[0].config if source.adapters else {}
    repo, revision = split_revision(source.reference)
    named = {"task_type": "CAUSAL_LM", "base_model_name_or_path": repo, "revision": revision}
    return {
        **named,
        **{key: first[key] for key in _KEPT if first.get(key) and not _is_gone(first)},
        **_targets(source.adapters if len(source.adapters) == len(source.deltas) else (), ranks),
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _is_gone(config: dict[str, Any]) -> bool:
    """Does an adapter name its base by a path, of another machine or another day, that leads nowhere?"""
    name = config.get("base_model_name_or_path") or ""
    return (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).expanduser().exists()


def _targets(adapters: Sequence[Adapter], ranks: dict[str, int]) -> dict[str, Any]:
    """The adapters' own short list of targets where it means exactly these modules, else all names."""
    first = adapters[0].config if adapters else {}
    same = adapters and all(
        set(adapter.factors) == set(ranks) and all(adapter.config.get(key) == first.get(key) for key in _TARGETS)
        for adapter in adapters
    )
    return {key: first[key] for key in _TARGETS if key in first} if same else {"target_modules": sorted(ranks)}
