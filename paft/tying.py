"""Where the base ties its head to its embedding there is one tensor for both: an adapter must change both alike.

PEFT does so for ``trainable_token_indices``, and with ``ensure_weight_tying`` for the rest. (Its `merge_and_unload`
then adds the product of embedding and head twice; here it is added once, which is what the adapter computes before it
is merged.) Without it PEFT changes one of the two in the running model, and either unties the merged one or lets the
change leak into the other: that is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from paft.checkpoint import Checkpoint
from paft.errors import MismatchError
from paft.factors import Rows, Saved
from paft.naming import Names
from paft.variants import LowRank, Part

Parts = dict[str, list[Part]]


def untangle(parts: Parts, names: Names) -> dict[str, str]:
    """Move the changes of tied tensors to what is stored, in place; returns second copy -> first of those stored twice.

    Raises MismatchError when one of two tied tensors is changed alone or otherwise than the other.
    """
    twins: dict[str, str] = {}
    if not any(names.may_be_tied(name) for name in parts):
        return twins
    for head, embedding in names.ties.items():
        on_head, on_embedding = parts.pop(head, []), parts.pop(embedding, [])
        if not on_head and not on_embedding:
            continue
        rows_alone = not on_head and all(isinstance(part, Rows) for part in on_embedding)
        alike = len(on_head) == len(on_embedding) and all(map(_same, on_head, on_embedding))
        if not rows_alone and not alike:
            _refuse(head, embedding, on_head, on_embedding, names.adapter)
        stored = [name for name in (embedding, head) if name in names.base.entries]
        parts.update(dict.fromkeys(stored, on_embedding))
        twins.update(dict.fromkeys(stored, stored[0]))
    return twins


def _refuse(head: str, embedding: str, on_head: Sequence[Part], on_embedding: Sequence[Part], adapter: str) -> None:
    one, other = (head, embedding) if on_head else (embedding, head)
    how = "otherwise" if on_head and on_embedding else "alone"
    raise MismatchError(
        f"{adapter}: {one.removesuffix('.weight')} is tied to {other.removesuffix('.weight')} of the base, "
        f"but the adapter changes it {how}",
        hint="train with ensure_weight_tying, or untie the base first (tie_word_embeddings=false)",
    )


def _same(one: Part, two: Part) -> bool:
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        a, b = one.factors, two.factors
        if a.magnitude is not None or b.magnitude is not None:
            return False  # the norm runs along the hidden units for a head, along the vocabulary for an embedding
        return torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and a.scale == b.scale and one.transposed == two.transposed
    if isinstance(one, Rows) and isinstance(two, Rows):
        return one.indices == two.indices and torch.equal(one.values, two.values)
    if isinstance(one, Saved) and isinstance(two, Saved):
        a, b = one.entry, two.entry
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        file = Checkpoint(a.file.parent, (a.file,), {"a": replace(a), "b": replace(b)}, {})
        return file.raw("a") == file.raw("b")
    return False
