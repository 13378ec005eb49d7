"""What the base calls the tensor that an adapter names: PEFT's names are the loaded model's, a file has its own.

Tried in this order: the full name; the one base tensor whose name is that without (or with) a prefix, as GPT-2's
``h.0`` for ``transformer.h.0``; transformers' own table of conversions (``lm_head`` of GPT-NeoX is stored as
``embed_out``, the experts of Mixtral one by one). The table is only read, and transformers only imported, when the
first two fail or when a tensor may be tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from paft.checkpoint import Checkpoint
from paft.errors import MismatchError, PaftError
from paft.peftfile import EMBEDDINGS, HEADS


@dataclass(frozen=True)
class Piece:
    """One tensor of a file out of which a parameter is made: its name, and its place in the conversion."""

    name: str
    place: int


@dataclass(frozen=True)
class Stored:
    """How a file stores a parameter of the loaded model: in pieces, joined by ``operations``."""

    pieces: tuple[Piece, ...]
    operations: tuple[tuple[str, int | None], ...]  # (name, dim)


@dataclass(frozen=True)
class Names:
    """The names of one base, for one adapter (whose own names go into messages)."""

    base: Checkpoint
    adapter: str
    trained_on: str | None

    def find(self, name: str, hint: str | None = None) -> str:
        """The base's tensor for the loaded model's ``name``; a tied one that is not stored keeps its name.

        Raises MismatchError when there is none, or when the base stores it in another layout.
        """
        found = self.look(name)
        if found is not None:
            return found
        if name in self.stored:
            kept = ", ".join(piece.name for piece in self.stored[name].pieces[:3])
            raise MismatchError(f"{self.adapter}: the base stores {name} in another layout, as {kept}")
        if self.stored_as(name) is not None:
            return name
        hint = hint or f"the adapter was trained on {self.trained_on or 'another model'}"
        raise MismatchError(f"{self.adapter}: the base has no tensor {name}", hint=hint)

    def stored_as(self, name: str) -> str | None:
        """The tensor of the base's files that holds ``name``: itself, or what it is tied to."""
        if name in self.base.entries:
            return name
        partners = self.ties | {embedding: head for head, embedding in self.ties.items()}
        return partners.get(name) if partners.get(name) in self.base.entries else None

    def look(self, name: str) -> str | None:
        """The base's tensor for ``name``, or None."""
        entries = self.base.entries
        if name in entries:
            return name
        near = [other for other in entries if other.endswith("." + name) or name.endswith("." + other)]
        if len(near) == 1:
            return near[0]
        stored = self.stored.get(name)
        return stored.pieces[0].name if stored and not stored.operations else None

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Every parameter of the loaded model by transformers' conversions; empty for a model it does not know."""
        return _conversions(self.base)

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tied tensors, head -> embedding, by the base's names; a head that is not stored has the model's name.

        transformers 5 ties what the configuration says is tied, unless the file holds both with different values.
        """
        if not _says_tied(self.base):
            return {}
        ties = {}
        for head, embedding in _tied_pairs(self.base).items():
            head, embedding = self.look(head) or head, self.look(embedding) or embedding
            if _alike(self.base, head, embedding):
                ties[head] = embedding
        return ties

    def may_be_tied(self, name: str) -> bool:
        """Is it worth asking? True for what is called a head or an embedding, or is as long as the vocabulary."""
        entry = self.base.entries.get(name)
        long = entry is not None and len(entry.shape) == 2 and entry.shape[0] == _option(self.base, "vocab_size")
        return long or is_vocabulary(name)


def aligned(tuned: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A fine-tuned model by its base's names, whatever prefix its file has and whether it stores a tied head again.

    Raises MismatchError for a tensor that only one of them has.
    """
    if tuned.entries.keys() == base.entries.keys():
        return tuned
    names, hint = Names(tuned, tuned.path.name, None), "a full model must have the tensors of its base"
    found: dict[str, str] = {}
    for name in base.entries:
        other = names.look(name) or names.stored_as(name)
        if other is None:
            raise MismatchError(f"{tuned.path.name} has no tensor {name}", hint=hint)
        found[name] = other
    twins = {one for pair in names.ties.items() if set(pair) & set(found.values()) for one in pair}
    for name in sorted(tuned.entries.keys() - set(found.values()) - twins):
        raise MismatchError(f"{base.path.name} has no tensor {name}", hint=hint)
    return Checkpoint(tuned.path, tuned.files, {name: tuned.entries[other] for name, other in found.items()}, tuned.config)


def is_vocabulary(name: str) -> bool:
    """Is this tensor called like an embedding or a head?"""
    return name.split(".")[-2:][0] in HEADS + EMBEDDINGS


def _option(base: Checkpoint, option: str) -> Any:
    nested = base.config.get("text_config")
    return base.config.get(option, nested.get(option) if isinstance(nested, dict) else None)


def _says_tied(base: Checkpoint) -> bool:
    said = _option(base, "tie_word_embeddings")
    if said is not None:
        return bool(said)
    if not base.config:
        return False
    from transformers import CONFIG_MAPPING

    kind = str(base.config.get("model_type"))
    return bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", True)) if kind in CONFIG_MAPPING else False


def _tied_pairs(base: Checkpoint) -> dict[str, str]:
    """head -> embedding, as the model's class says; by their usual names for a class that transformers does not have."""
    import transformers

    classes = [getattr(transformers, str(name), None) for name in base.config.get("architectures") or []]
    for known in classes:
        pairs = getattr(known, "_tied_weights_keys", None)
        if isinstance(pairs, dict):
            return dict(pairs)
    embeddings = [name for name in base.entries if name.split(".")[-2:][0] in EMBEDDINGS and name.endswith(".weight")]
    return {f"{head}.weight": embeddings[0] for head in HEADS} if len(embeddings) == 1 else {}


def _alike(base: Checkpoint, one: str, two: str) -> bool:
    entries = base.entries
    if one not in entries or two not in entries:
        return one != two
    if entries[one].shape != entries[two].shape or entries[one].dtype != entries[two].dtype:
        return False
    rows = max(1, (1 << 20) // max(1, entries[one].columns))
    starts = range(0, entries[one].rows, rows)
    ends = [min(start + rows, entries[one].rows) for start in starts]
    return all(torch.equal(base.tile(one, *span), base.tile(two, *span)) for span in zip(starts, ends, strict=True))


def _conversions(base: Checkpoint) -> dict[str, Stored]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    from paft.models import skeleton

    try:
        model = skeleton(base.path)
    except PaftError:
        return {}  # no configuration, or a model that transformers does not know: names are what they are
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    pieces: dict[str, list[Piece]] = {}
    operations: dict[str, tuple[tuple[str, int | None], ...]] = {}
    for name in sorted(base.entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        place = 0
        if pattern is not None:
            converter = by_pattern[pattern]
            place = converter.source_patterns.index(pattern)
            operations[target] = tuple((type(each).__name__, getattr(each, "dim", None)) for each in converter.operations)
        pieces.setdefault(target, []).append(Piece(name, place))
    return {target: Stored(tuple(found), operations.get(target, ())) for target, found in pieces.items()}
