"""The tensors of a PEFT LoRA file, sorted by what each does to the base; one that does nothing known is refused.

    lora_A, lora_B                 ΔW = s·B·A,        A: [r, in],  B: [out, r]
    lora_embedding_A, _B           ΔW = s·(B·A)ᵀ,     A: [r, vocabulary],  B: [hidden, r]; kept as s·B'·A', B' = Aᵀ, A' = Bᵀ
    lora_magnitude_vector          DoRA's m, [out] ([hidden] for an embedding)
    lora_B.bias                    Δb = s·bias
    token_adapter                  rows of an embedding, replaced
    lora_A, lora_B of a parameter  ΔW_e = s·B_e·A_e of E stacked experts; A: [E·r, in],  B: [out, r·E], experts innermost
    anything without lora_         a tensor of the base, replaced: modules_to_save, bias="all", a copy of the head

What the file holds and what adapter_config.json says must agree: PEFT leaves a tensor that is missing at its random
start and ignores one too many, with a warning. Here both are a MismatchError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paft.checkpoint import Checkpoint, read_entries
from paft.errors import MismatchError
from paft.factors import Factors, Parts, Rows, Saved, Stored
from paft.patterns import matches
from paft.store import WeightFile

PREFIX = "base_model.model."
# Names of the embedding and the head in the architectures of transformers. PEFT stores copies of these unasked.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
HEADS = ("lm_head", "embed_out")
_KINDS = {
    "factor": r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight",
    "embedding": r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])",
    "magnitude": r"(?P<module>.+)\.lora_magnitude_vector(?P<side>)",
    "bias": r"(?P<module>.+)\.lora_B\.bias(?P<side>)",
    "rows": r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?P<side>)",
    "saved": r"(?P<module>(?!.*(?:lora_|token_adapter\.)).+)(?P<side>)",
}
_STACK_ORDER = ("gate_up_proj", "down_proj")  # PEFT wraps a module's parameters in the order of their registration


def read_parts(name: str, file: WeightFile, config: Mapping[str, Any]) -> Parts:
    """Read and check an adapter's file; factors of linear layers (widened to float32 when used) and replaced tensors stay there.

    Raises MismatchError, with the tensor's name, for a damaged file, a tensor that nothing would use, that is missing,
    that has the wrong shape or that holds NaN or infinity, and for an empty file.
    """
    entries = {entry.name: entry for entry in read_entries(file)}
    if not entries:
        raise MismatchError(f"{name} is empty: it holds no tensors", hint="save the adapter again")
    return _Reader(name, Checkpoint(file.parent, (file,), entries, {}), config).parts()


def scale_and_rank(config: Mapping[str, Any], module: str) -> tuple[float, int]:
    """s = alpha/r (alpha/√r with ``use_rslora``) and r; patterns are PEFT's regular expressions, first match wins."""
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if not isinstance(rank, int) or rank < 1:
        raise MismatchError(f"{module} has rank {rank} by its configuration", hint="a rank is a positive integer")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise MismatchError(f"{module} has alpha {alpha} by its configuration", hint="alpha is a finite number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if matches(pattern, module, tail=True):
            return value
    return default


def _is_targeted(targets: Any, module: str) -> bool:
    """Is ``module`` one of the configuration's ``target_modules`` (a list of endings, or one regular expression)?"""
    if isinstance(targets, str):
        return targets == "all-linear" or matches(targets, module)
    return any(module == target or module.endswith(f".{target}") for target in targets or [])


@dataclass(frozen=True)
class _Reader:
    name: str
    source: Checkpoint
    config: Mapping[str, Any]

    def parts(self) -> Parts:
        found = self._sort()
        factors: dict[str, Factors] = {}
        wrapped: dict[str, dict[int, dict[str, str]]] = {}  # a module's wrapped parameters, by depth of their wrapper
        for module, keys in found["factor"].items():
            holder, depth = _unwrapped(module)
            if depth or (self.config.get("target_parameters") and not _is_targeted(self.config.get("target_modules"), module)):
                wrapped.setdefault(holder, {})[depth] = keys
            else:
                factors[module] = self._factors(module, keys, found)
        factors |= {module: self._factors(module, keys, found, embedding=True) for module, keys in found["embedding"].items()}
        stacks: dict[str, tuple[str, ...]] = {}
        for holder, depths in wrapped.items():
            if sorted(depths) != list(range(len(depths))):
                raise MismatchError(f"{self.name}: {holder} lacks the factors of a parameter outside of base_layer")
            for parameter, keys in zip(_parameters(self.name, self.config, holder, len(depths)), _by_depth(depths), strict=True):
                experts = self._experts(holder, parameter, keys)
                factors |= experts
                if parameter != "weight":
                    stacks[f"{holder}.{parameter}"] = tuple(experts)
        for module, keys in (*found["magnitude"].items(), *found["bias"].items()):
            if module not in found["factor"].keys() | found["embedding"].keys() or _unwrapped(module)[0] in wrapped:
                raise MismatchError(f"{self.name}: tensor {keys['']} belongs to no LoRA factors, so nothing would use it")
        biases = {module: factors[module].scale * self._tensor(keys[""], 1) for module, keys in found["bias"].items()}
        saved = [self._saved(keys[""]) for keys in found["saved"].values()]
        if len(dict(saved)) != len(saved):
            raise MismatchError(f"{self.name} holds a tensor twice, with and without base_layer")
        return Parts(dict(sorted(factors.items())), biases, self._rows(found["rows"]), dict(sorted(saved)), stacks)

    def _sort(self) -> dict[str, dict[str, dict[str, str]]]:
        """kind -> module -> side -> key of the file."""
        found: dict[str, dict[str, dict[str, str]]] = {kind: {} for kind in _KINDS}
        for key in self.source.entries:
            for kind, pattern in _KINDS.items():
                if match := re.fullmatch(re.escape(PREFIX) + pattern, key):
                    found[kind].setdefault(match["module"], {})[match["side"]] = key
                    break
            else:
                raise MismatchError(f"{self.name}: tensor {key} is no part of a LoRA, so nothing would use it")
        return found

    def _tensor(self, key: str, dims: int) -> torch.Tensor:
        entry = self.source.entries[key]
        if len(entry.shape) != dims or not entry.is_float:
            what = "matrix" if dims == 2 else "vector"
            raise MismatchError(f"{self.name}: tensor {key} is no float {what}: {entry.dtype} {list(entry.shape)}")
        tensor = self.source.tile(key, 0, entry.rows).view(entry.shape).float()
        self._check_finite(key, tensor)
        return tensor

    def _check_finite(self, key: str, tensor: torch.Tensor) -> None:
        if not torch.isfinite(tensor).all():
            raise MismatchError(f"{self.name}: tensor {key} holds NaN or infinity", hint="training diverged; train it again")

    def _pair(self, module: str, keys: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(keys) != 2:
            raise MismatchError(f"{self.name}: {module} has lora_{next(iter(keys))} without its partner")
        return self._tensor(keys["A"], 2), self._tensor(keys["B"], 2)

    def _factors(
        self, module: str, keys: dict[str, str], found: dict[str, dict[str, dict[str, str]]], embedding: bool = False
    ) -> Factors:
        a, b = self._pair(module, keys)
        scale, rank = scale_and_rank(self.config, module)
        if not a.shape[0] == b.shape[1] == rank:
            raise MismatchError(
                f"{self.name}: {module} should have rank {rank} but has A {list(a.shape)}, B {list(b.shape)}"
            )
        magnitude = None
        for kind, option in (("magnitude", "use_dora"), ("bias", "lora_bias")):
            self._check_beside(module, kind, option, found[kind].get(module, {}).get(""), len(b), embedding)
        if module in found["magnitude"]:
            magnitude = self._tensor(found["magnitude"][module][""], 1)
        if embedding:
            return Factors(b.T.contiguous(), a.T.contiguous(), scale, False, True, magnitude)
        left, right = (Stored(partial(self._tensor, keys[side], 2), self.source.entries[keys[side]].shape) for side in "AB")
        return Factors(left, right, scale, bool(self.config.get("fan_in_fan_out")), False, magnitude)

    def _check_beside(self, module: str, kind: str, option: str, key: str | None, size: int, embedding: bool) -> None:
        """A module has DoRA's magnitude, or a LoRA bias, exactly when the configuration says so."""
        wanted = bool(self.config.get(option)) and not (kind == "bias" and embedding)
        if key is None and wanted:
            raise MismatchError(f"{self.name}: {option} is set but {module} has no {kind}")
        if key is not None and not wanted:
            raise MismatchError(f"{self.name}: tensor {key} is a {kind} but {option} is not set, so nothing would use it")
        if key is not None and self.source.entries[key].shape != (size,):
            raise MismatchError(f"{self.name}: tensor {key} is {list(self.source.entries[key].shape)}, not [{size}]")

    def _experts(self, holder: str, parameter: str, keys: dict[str, str]) -> dict[str, Factors]:
        """One parameter's factors, cut into experts: ``holder.e.parameter``; a matrix is named as its module."""
        a, b = self._pair(f"{holder}.{parameter}", keys)
        scale, rank = scale_and_rank(self.config, f"{holder}.{parameter}")
        experts, rest = divmod(len(a), rank)
        if rest or b.shape[1] != len(a):
            shapes = f"A {list(a.shape)}, B {list(b.shape)}"
            raise MismatchError(f"{self.name}: {holder}.{parameter} should have rank {rank} per expert but has {shapes}")
        if parameter == "weight" and experts == 1:
            return {holder: Factors(a, b, scale, False)}
        stacked = b.view(len(b), rank, experts)
        cut = [(a[e * rank : (e + 1) * rank], stacked[:, :, e].contiguous()) for e in range(experts)]
        return {f"{holder}.{e}.{parameter}": Factors(left, right, scale, False) for e, (left, right) in enumerate(cut)}

    def _rows(self, found: dict[str, dict[str, str]]) -> dict[str, Rows]:
        given = self.config.get("trainable_token_indices") or {}
        if bool(given) != bool(found):
            raise MismatchError(f"{self.name}: trainable_token_indices and the tensors of the file do not agree")
        rows = {}
        for module, keys in found.items():
            if isinstance(given, dict):
                fits = [value for ending, value in given.items() if module.endswith(ending)]
            else:
                fits = [given] if len(found) == 1 else []
            values = self._tensor(keys[""], 2)
            if len(fits) != 1 or not isinstance(fits[0], list) or len(set(fits[0])) != len(values):
                raise MismatchError(f"{self.name}: trainable_token_indices do not say which rows {keys['']} replaces")
            rows[module] = Rows(tuple(fits[0]), values)
        return rows

    def _saved(self, key: str) -> tuple[str, Saved]:
        entry = self.source.entries[key]
        if entry.is_float:
            step = max(1, (1 << 18) // max(1, entry.columns))
            for start in range(0, entry.rows, step):
                self._check_finite(key, self.source.tile(key, start, min(start + step, entry.rows)))
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        return name, Saved(entry, ".base_layer." in key or _is_declared(self.config, name))


def _is_declared(config: Mapping[str, Any], name: str) -> bool:
    """Does the configuration say that a tensor is replaced? PEFT saves a resized embedding or head without saying so."""
    module, _, leaf = name.rpartition(".")
    steps = [module[: match.start()] for match in re.finditer(r"\.|$", module)]  # a, a.b, a.b.c of a.b.c
    saved = any(step.endswith(target) for target in config.get("modules_to_save") or [] for step in steps)
    biased = leaf == "bias" and config.get("bias", "none") != "none"
    return saved or biased or module.rpartition(".")[2] in EMBEDDINGS + HEADS


def _unwrapped(module: str) -> tuple[str, int]:
    """A module's name without the wrappers of its parameters, and how many there were."""
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return module, depth


def _parameters(name: str, config: Mapping[str, Any], holder: str, count: int) -> list[str]:
    """The wrapped parameters of a module, innermost wrapper first."""
    near, far = set(), set()
    for target in config.get("target_parameters") or []:
        module, _, parameter = str(target).rpartition(".")
        if not module:
            far.add(parameter)
        elif f".{holder}.{parameter}".endswith(f".{target}"):
            near.add(parameter)
    names = next((each for each in (near, near | far) if len(each) == count), set())
    if count > 1 and names == set(_STACK_ORDER):
        return list(_STACK_ORDER)
    if count != 1 or not names:
        given = config.get("target_parameters")
        raise MismatchError(f"{name}: which of target_parameters {given} is adapted in {holder} cannot be told from the file")
    return list(names)


def _by_depth(depths: dict[int, dict[str, str]]) -> list[dict[str, str]]:
    return [depths[depth] for depth in sorted(depths, reverse=True)]
