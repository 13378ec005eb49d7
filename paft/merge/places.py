"""Which module of the model a tensor of the base belongs to, and what LoRA can do there.

    Linear      W [out, in]    ΔW = B A          lora_A [r, in],             lora_B [out, r]
    Conv1D      W [in, out]    ΔW = (B A)ᵀ       the same; ``fan_in_fan_out``
    Embedding   W [rows, dim]  ΔW = (B A)ᵀ       lora_embedding_A [r, rows], lora_embedding_B [dim, r]

The classes are read off the model that transformers would build, without its weights. Where it knows none (custom
code), only what an adapter names is placed, as a Linear or, for GPT-2's kin, a Conv1D.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paft.checkpoint import Checkpoint
from paft.delta import Delta, LoraDelta
from paft.errors import MismatchError, PaftError
from paft.models import skeleton
from paft.naming import Names
from paft.peftfile import HEADS
from paft.placement import CONV1D_MODELS

_KINDS = {"Linear": (False, "lora_{}.weight"), "Conv1D": (True, "lora_{}.weight"), "Embedding": (True, "lora_embedding_{}")}


@dataclass(frozen=True)
class Place:
    """A module that LoRA can adapt, by the name that PEFT uses; ``why_not`` says why it would not be exact."""

    module: str
    kind: str
    why_not: str | None = None

    def factors(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        """PEFT's tensors for ``ΔW = left @ right``, float32, with scale 1."""
        transposed, name = _KINDS[self.kind]
        a, b = (left.T, right.T) if transposed else (right, left)
        prefix = f"base_model.model.{self.module}."
        return {prefix + name.format("A"): a.float().contiguous(), prefix + name.format("B"): b.float().contiguous()}


def find_places(base: Checkpoint, names: Iterable[str], deltas: Sequence[Delta]) -> dict[str, Place]:
    """The place of every tensor that has one; a tensor without (a norm, a bias, an unknown module) is left out.

    Raises MismatchError where adapters call one tensor by different names.
    """
    model = _model(base)
    modules = {} if model is None else dict(model.named_modules())
    tied = model is not None and bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    ends = [] if model is None else [model.get_input_embeddings(), model.get_output_embeddings()]
    loaded = {stored.pieces[0].name: each for each, stored in Names(base, "", None).stored.items() if not stored.operations}
    found: dict[str, Place] = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        entry = base.entries[name]
        if leaf != "weight" or len(entry.shape) != 2 or not entry.is_float:
            continue
        own = _named_by_adapters(name, deltas)
        module = next((each for each in _spellings(stem, loaded.get(name), model) if each in modules), None)
        by_name = _by_name(stem, base.config) if own and model is None else None
        kind = by_name if module is None else _kind(modules[module])
        if kind is None:
            continue
        shared = tied and module is not None and any(modules[module] is end for end in ends)
        why_not = "the embedding and the head are tied, and LoRA would change only one of them" if shared else None
        found[name] = Place(own or str(module), kind, why_not)
    return found


def _model(base: Checkpoint) -> Any:
    try:
        return skeleton(base.path)
    except PaftError:
        return None  # an architecture that transformers does not build by itself


def _named_by_adapters(name: str, deltas: Sequence[Delta]) -> str | None:
    named = {delta.modules[name] for delta in deltas if isinstance(delta, LoraDelta) and name in delta.modules}
    if len(named) > 1:
        raise MismatchError(f"the adapters call {name} by different names: {', '.join(sorted(named))}")
    return named.pop() if named else None


def _spellings(stem: str, loaded: str | None, model: Any) -> list[str]:
    """A name as transformers converts it (GPT-NeoX's ``embed_out`` is loaded as ``lm_head``), then as it is stored, with
    and without the prefix of the inner model: GPT-2's files say ``h.0`` for ``transformer.h.0``."""
    prefix = getattr(model, "base_model_prefix", "")
    converted = [loaded.removesuffix(".weight")] if loaded else []
    return [*converted, stem, f"{prefix}.{stem}", stem.removeprefix(f"{prefix}.")]


def _kind(module: Any) -> str | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear | Conv1D):
        return "Conv1D" if isinstance(module, Conv1D) else "Linear"
    # PEFT knows the plain class, and Gemma's with a scale; others may shift the rows.
    known = type(module) is torch.nn.Embedding or hasattr(module, "embed_scale")
    return "Embedding" if isinstance(module, torch.nn.Embedding) and known else None


def _by_name(stem: str, config: dict[str, Any]) -> str:
    return "Conv1D" if config.get("model_type") in CONV1D_MODELS and stem.rpartition(".")[2] not in HEADS else "Linear"
