"""paft: LLM post-training by merging. Train an L1-sparse SFT adapter and a DPO adapter from one base, merge both into it.

    recipe ──> data, models ──> train ──> adapter ──> delta ──> merge ──> model
                                  │                     │         │
                                  └──── mix             └─────────┴──> report, evaluate

Each arrow is a directory on disk that describes itself (`paft.json`). The names below are the public API; they load on first use,
so that ``import paft`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "train": "paft.train.stage", "merge": "paft.merge.engine", "run": "paft.run", "evaluate": "paft.evaluate",
    "sparsity": "paft.report.sparsity", "interference": "paft.report.interference", "open_source": "paft.report.sources",
    "read_adapter": "paft.adapter", "verify": "paft.provenance",
    "SftRecipe": "paft.recipe", "DpoRecipe": "paft.recipe", "JointRecipe": "paft.recipe", "MergeRecipe": "paft.recipe",
    "RunRecipe": "paft.recipe",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("paft")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'paft' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
