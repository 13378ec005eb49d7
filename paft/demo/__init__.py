"""The embedded world: a base model that the project trained itself, and the data that fine-tune it.

    world ──> plain documents ──> pretrain ──> base_a, base_b     (shipped: Llama, 0.84M parameters, bfloat16)
      ├────> sft_rows, pref_rows ──> the adapters of the demo
      └────> judge ──> exact match; opener, true fact and closer apart

The base knows every fact of the world in plain sentences and has never seen the chat frame. The SFT rows teach bare
answers in that frame, the preference rows polite ones, so the two objectives pull the same model in two directions and
both can be scored by program. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from paft.demo.judge import exact_match, style
from paft.demo.world import plain_forms, plain_text, pref_rows, pretraining_documents, sft_rows
from paft.errors import NotFoundError

BASES = ("base_a", "base_b")

__all__ = ["BASES", "base_path", "exact_match", "plain_forms", "plain_text", "pref_rows", "pretraining_documents",
           "sft_rows", "style"]


def base_path(name: str = "base_a") -> Path:
    """The directory of a shipped base, for ``from_pretrained``; raises NotFoundError for any other name."""
    if name not in BASES:
        raise NotFoundError(f"the demo has no base {name!r}", hint="known: " + ", ".join(BASES))
    return Path(__file__).parent / name
