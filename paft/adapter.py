"""PEFT LoRA adapters in and out: a directory becomes named factors (A, B, s) and what stands beside them.

    ΔW = s·B·A,   A: [r, in],  B: [out, r],   s = alpha/r, or alpha/√r with `use_rslora`

alpha and r are per module (`alpha_pattern`, `rank_pattern`: PEFT's regular expressions, first match wins).
`fan_in_fan_out` says that the base stores W as [in, out]. Beside the factors (`paft.peftfile`) stand DoRA's
magnitudes, LoRA biases, replaced tensors and replaced rows of an embedding. What changes the base's weights before the
training, or acts on part of the input only, has no ΔW and is a MismatchError.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paft import hub
from paft.errors import MismatchError, NotFoundError
from paft.factors import Factors, Rows, Saved
from paft.jsonfile import read_json
from paft.peftfile import PREFIX, read_parts
from paft.provenance import content_hash
from paft.store import WeightFile, is_url, weight_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PATTERNS = [CONFIG, WEIGHTS, "adapter_model.bin", "paft.json"]

# Fields of LoraConfig whose result is no fixed change of the base's weights. Any value that counts as true is refused.
_UNSUPPORTED = {
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "an activated LoRA acts on part of the text only",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "the factors are block-diagonal",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "the factors are random variables",
    "velora_config": "VeLoRA keeps buffers beside the factors",
    "arrow_config": "Arrow routes between adapters for each token",
    "megatron_config": "the factors are split over devices",
}
# What a plain LoRA does not have: PEFT would look for tensors that are not there.
_WITHOUT = {"use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "trainable_token_indices": None}
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ subtract their start from it.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What is read of the rest: option, types, in words.
_TYPES = (
    ("r", int, "a whole number"),
    ("lora_alpha", int | float, "a number"),
    ("rank_pattern", dict | None, "a mapping"),
    ("alpha_pattern", dict | None, "a mapping"),
    ("target_parameters", list | None, "a list"),
    ("modules_to_save", list | None, "a list"),
    ("trainable_token_indices", list | dict | None, "a list or a mapping"),
    ("base_model_name_or_path", str | None, "a name"),
    ("revision", str | None, "a name"),
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: ``factors`` maps module names, such as ``model.layers.0.mlp.up_proj``, to s·B·A.

    The rest is what s·B·A cannot say: ``biases`` (Δb of a module's bias), ``rows`` (replaced rows of an embedding),
    ``saved`` (replaced tensors, by name; PEFT also stores copies that equal the base's) and ``stacks`` (a parameter
    that stacks experts, as the names of their ``factors``). `paft.placement` lays all of it on a base.
    """

    path: Path
    name: str
    config: dict[str, Any]
    base_model: str | None
    base_revision: str | None
    factors: Mapping[str, Factors]
    content_hash: str
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    saved: Mapping[str, Saved] = field(default_factory=dict)
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def beside(self) -> dict[str, str]:
        """What ``factors`` leaves out of the change: name -> what it is."""
        dora = {module: "the magnitudes of DoRA" for module, f in self.factors.items() if f.magnitude is not None}
        named = ((self.biases, "a LoRA bias"), (self.rows, "replaced rows"), (self.saved, "a tensor saved whole"))
        return dora | {name: what for mapping, what in named for name in mapping}


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA from a directory or from the hub (``org/name[@revision]``), with every tensor accounted for.

    Raises NotFoundError where there is none, MismatchError for a variant that has no fixed ΔW, for a tensor that is
    left over, lacks its partner, has the wrong shape or holds NaN or infinity, and for pickled weights.
    """
    directory = hub.resolve(str(path), kind="adapter", patterns=PATTERNS)
    config = read_config(directory)
    name = label(str(path), directory)
    parts = read_parts(name, _weights_file(directory), config)
    base, revision = config.get("base_model_name_or_path") or None, config.get("revision") or None
    beside = (parts.biases, parts.rows, parts.saved, parts.stacks)
    return Adapter(directory, name, config, base, revision, parts.factors, content_hash(directory), *beside)


def label(given: str, directory: Path) -> str:
    """A name for records: ``org/name@revision`` for a hub snapshot, else what was given, without its path."""
    if is_url(given):
        return given.rstrip("/").rpartition("/")[2]
    if directory.parent.name == "snapshots" and directory.parents[1].name.startswith("models--"):
        return directory.parents[1].name.removeprefix("models--").replace("--", "/") + "@" + directory.name
    return directory.resolve().name if os.path.exists(os.path.expanduser(given)) else given


def read_config(directory: Path) -> dict[str, Any]:
    """The adapter's configuration; raises for a type or an option whose result is no fixed change of the base."""
    if not (directory / CONFIG).is_file():
        raise NotFoundError(f"{directory} is not an adapter: it has no {CONFIG}")
    config = read_json(directory / CONFIG)
    where = directory.name
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise MismatchError(f"{where} is of type {kind or 'unknown'}; only LORA can be merged exactly")
    for option, why in _UNSUPPORTED.items():
        if config.get(option):
            raise MismatchError(f"{where} uses {option}: {why}, which cannot be merged exactly")
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise MismatchError(
            f"{where} uses init_lora_weights={config['init_lora_weights']}: it changed the base it starts from",
            hint="convert it with save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    for option, kinds, what in _TYPES:
        value = config.get(option)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise MismatchError(f"{directory / CONFIG}: {option} should be {what}, not {value!r}")
    return config


def _weights_file(directory: Path) -> WeightFile:
    file = weight_file(directory / WEIGHTS)
    if file is None:
        if (directory / "adapter_model.bin").is_file():
            raise MismatchError(f"{directory} holds pickled weights only", hint="save the adapter again as safetensors")
        raise NotFoundError(f"{directory} holds no {WEIGHTS}")
    return file


def concatenate(
    adapters: Sequence[Adapter], weights: Sequence[float] | Mapping[str, Sequence[float]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The weighted sum of adapters as one LoRA, exactly: ``Σ w_i s_i B_i A_i = [w_1 s_1 B_1 | ...] @ [A_1; ...]``.

    ``weights`` is one number per adapter, or such a list for each module. Ranks add up; modules whose ranks differ
    from the commonest go into ``rank_pattern``, and alpha equals the rank everywhere, so that s = 1. Returns (config,
    tensors) for `save_adapter`. PEFT's ``combination_type="cat"`` is the same sum for equal weights on every module.

    Raises MismatchError, with the module's name, for what such a sum cannot say: DoRA, biases, replaced tensors (also a
    copy of the base's own, which cannot be told apart here) and rows, experts.
    """
    for adapter in adapters:
        check_low_rank(adapter)
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        shares = weights[module] if isinstance(weights, Mapping) else weights
        parts = [(w, a.factors[module]) for w, a in zip(shares, adapters, strict=True) if module in a.factors]
        if len({f.shape for _, f in parts}) > 1:
            raise MismatchError(f"the adapters disagree on the shape of {module}", hint="they were trained on different bases")
        a = torch.cat([f.A for _, f in parts])
        b = torch.cat([f.B * (w * f.scale) for w, f in parts], dim=1)
        prefix = f"{PREFIX}{module}.lora_"
        if parts[0][1].embedding:
            tensors |= {prefix + "embedding_A": b.T, prefix + "embedding_B": a.T}
        else:
            tensors |= {prefix + "A.weight": a, prefix + "B.weight": b}
        ranks[module] = len(a)
    return _sum_config(adapters, ranks), tensors


def check_low_rank(adapter: Adapter) -> None:
    """Raises MismatchError, with a name, for an adapter whose change is more than s·B·A of linear layers and embeddings."""
    beside = adapter.beside | {name: "LoRA on a bare parameter" for name in adapter.config.get("target_parameters") or []}
    for name, what in beside.items():
        raise MismatchError(
            f"{adapter.name}: {name} has {what}, which no sum of LoRAs can say",
            hint="write a full model or a delta instead of an adapter",
        )


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
        **_WITHOUT,
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
