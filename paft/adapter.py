"""PEFT LoRA adapters in and out: a directory becomes named factors (A, B, s), or is refused by name.

    ΔW = s·B·A,   A: [r, in],  B: [out, r],   s = alpha/r, or alpha/√r with `use_rslora`

alpha and r are per module (`alpha_pattern`, `rank_pattern`: PEFT's regular expressions, first match wins).
`fan_in_fan_out` says that the base stores W as [in, out]. What would not be exact (DoRA, biases, embeddings, saved
modules, ...) is a MismatchError.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from paft import hub
from paft.checkpoint import read_json
from paft.errors import MismatchError, NotFoundError
from paft.provenance import content_hash

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PATTERNS = [CONFIG, WEIGHTS, "adapter_model.bin", "paft.json"]

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_COPY = re.compile(r"base_model\.model\.(?P<module>(?!.*lora_).+?)(\.base_layer)?\.weight")
# Fields of LoraConfig that add something to, or change, s·B·A. Any value that counts as true is refused.
_UNSUPPORTED = {
    "use_dora": "DoRA rescales the rows of the base",
    "lora_bias": "LoRA with a bias changes the base's bias",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts bare parameters (MoE experts)",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "an activated LoRA acts on part of the text only",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "the factors are block-diagonal",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "the factors are random variables",
    "arrow_config": "Arrow routes between adapters for each token",
    "megatron_config": "the factors are split over devices",
}
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ subtract their start from it.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_PARTS = {
    "lora_embedding_": "LoRA on an embedding is not supported",
    "lora_magnitude_vector": "DoRA is not supported",
    ".lora_B.bias": "a LoRA bias is not supported",
}


@dataclass(frozen=True)
class Factors:
    """One module's ``ΔW = scale · B @ A``, float32; ``fan_in_fan_out`` is the configuration's claim about the base."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    fan_in_fan_out: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: ``factors`` maps module names of the base, such as ``model.layers.0.mlp.up_proj``.

    ``copies`` are weights of the base that PEFT stored beside the factors (it does so when the head is a target).
    They are no part of ΔW, so whoever uses the adapter must see that they equal the base's: `LoraDelta` does.
    """

    path: Path
    name: str
    config: dict[str, Any]
    base_model: str | None
    base_revision: str | None
    factors: Mapping[str, Factors]
    content_hash: str
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA from a directory or from the hub (``org/name[@revision]``), with every tensor accounted for.

    Raises NotFoundError where there is none, MismatchError for a variant that is not exactly ``s·B·A``, for a tensor
    that is left over, lacks its partner, has the wrong rank or holds NaN or infinity, and for pickled weights.
    """
    directory = hub.resolve(str(path), kind="adapter", patterns=PATTERNS)
    config = read_config(directory)
    tensors = _load(directory)
    name = label(str(path), directory)
    copies = {match["module"]: tensors.pop(key) for key in list(tensors) if (match := _COPY.fullmatch(key))}
    pairs = _pairs(name, tensors)
    factors = {module: _factors(name, config, module, pair) for module, pair in sorted(pairs.items())}
    base, revision = config.get("base_model_name_or_path") or None, config.get("revision") or None
    return Adapter(directory, name, config, base, revision, factors, content_hash(directory), copies)


def label(given: str, directory: Path) -> str:
    """A name for records: ``org/name@revision`` for a hub snapshot, else what was given without the machine's path."""
    if directory.parent.name == "snapshots" and directory.parents[1].name.startswith("models--"):
        return directory.parents[1].name.removeprefix("models--").replace("--", "/") + "@" + directory.name
    return directory.resolve().name if Path(given).expanduser().exists() else given


def read_config(directory: Path) -> dict[str, Any]:
    """The adapter's configuration; raises for a type or an option whose ΔW is not exactly ``s·B·A``."""
    if not (directory / CONFIG).is_file():
        raise NotFoundError(f"{directory} is not an adapter: it has no {CONFIG}")
    config = read_json(directory / CONFIG)
    where = directory.name
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise MismatchError(f"{where} is of type {kind or 'unknown'}; only LORA can be merged exactly")
    for option, why in _UNSUPPORTED.items():
        if config.get(option):
            raise MismatchError(f"{where} uses {option}: {why}, which is not supported yet")
    if config.get("bias", "none") != "none":
        raise MismatchError(f"{where} uses bias={config['bias']}: it changes the base's biases, which is not supported yet")
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise MismatchError(
            f"{where} uses init_lora_weights={config['init_lora_weights']}: it changed the base it starts from",
            hint="convert it with save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise MismatchError(f"{directory / CONFIG} lacks r or lora_alpha")
    return config


def _load(directory: Path) -> dict[str, torch.Tensor]:
    file = directory / WEIGHTS
    if not file.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise MismatchError(f"{directory} holds pickled weights only", hint="save the adapter again as safetensors")
        raise NotFoundError(f"{directory} holds no {WEIGHTS}")
    try:
        return load_file(file)
    except (SafetensorError, ValueError) as error:
        raise MismatchError(f"{file} is not a complete safetensors file", hint="copy or download it again") from error


def _pairs(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            why = next((why for part, why in _PARTS.items() if part in key), "not a LoRA factor, so nothing would use it")
            raise MismatchError(f"{name}: tensor {key}: {why}")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise MismatchError(f"{name}: tensor {key} is no float matrix: {tensor.dtype} {list(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise MismatchError(f"{name}: tensor {key} holds NaN or infinity", hint="training diverged; train it again")
        pairs.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not pairs:
        raise MismatchError(f"{name} is empty: it holds no LoRA factors")
    return pairs


def _factors(name: str, config: dict[str, Any], module: str, pair: dict[str, torch.Tensor]) -> Factors:
    if len(pair) != 2:
        raise MismatchError(f"{name}: {module} has lora_{next(iter(pair))} without its partner")
    rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
        shapes = f"A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
        raise MismatchError(f"{name}: {module} should have rank {rank} but has {shapes}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(pair["A"], pair["B"], scale, bool(config.get("fan_in_fan_out")))


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def concatenate(
    adapters: Sequence[Adapter], weights: Sequence[float] | Mapping[str, Sequence[float]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The weighted sum of adapters as one LoRA, exactly: ``Σ w_i s_i B_i A_i = [w_1 s_1 B_1 | ...] @ [A_1; ...]``.

    ``weights`` is one number per adapter, or such a list for each module. Ranks add up; modules whose ranks differ
    from the commonest go into ``rank_pattern``, and alpha equals the rank everywhere, so that s = 1. Returns (config,
    tensors) for `save_adapter`. PEFT's ``combination_type="cat"`` is the same sum for equal weights on every module.
    """
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        shares = weights[module] if isinstance(weights, Mapping) else weights
        parts = [(w, a.factors[module]) for w, a in zip(shares, adapters, strict=True) if module in a.factors]
        if len({(f.A.shape[1], f.B.shape[0]) for _, f in parts}) > 1:
            raise MismatchError(f"the adapters disagree on the shape of {module}", hint="they were trained on different bases")
        prefix = f"base_model.model.{module}.lora_"
        tensors[prefix + "A.weight"] = torch.cat([f.A for _, f in parts])
        tensors[prefix + "B.weight"] = torch.cat([f.B * (w * f.scale) for w, f in parts], dim=1)
        ranks[module] = len(tensors[prefix + "A.weight"])
    return _sum_config(adapters, ranks), tensors


def _sum_config(adapters: Sequence[Adapter], ranks: dict[str, int]) -> dict[str, Any]:
    common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    odd = {module: rank for module, rank in ranks.items() if rank != common}
    first = adapters[0].config
    config = {
        **first,
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if any(
        set(adapter.factors) != set(ranks) or adapter.config.get("target_modules") != first.get("target_modules")
        for adapter in adapters
    ):
        config |= {
            "target_modules": list(ranks),
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
        }
    return config


def save_adapter(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a directory that ``PeftModel.from_pretrained`` loads: the configuration and the factors as safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
