"""Sections of the recipes, and what every node of a recipe is: strict."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Strict(BaseModel):
    """A recipe node: unknown keys are errors, ``true`` is no number, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Fraction = Annotated[float, Field(ge=0, lt=1)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Lora(Strict):
    """A PEFT LoRA: ΔW = s·B·A with A (r × in), B (out × r), s = alpha/r, or alpha/√r with rslora.

    ``targets``: endings of module names, one regular expression for whole names, or ``all-linear`` (all but the head); ``layers``
    restricts them to some blocks. ``rank_pattern`` and ``alpha_pattern`` map regular expressions for the end of a name to another
    r and alpha. ``dora`` learns the norm of each row of W + ΔW beside it. ``modules_to_save`` are trained whole.
    """

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] | None = None
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    modules_to_save: list[str] = []
    bias: Literal["none", "all", "lora_only"] = "none"
    init: Literal["default", "gaussian", "orthogonal"] = "default"

    @field_validator("targets", "exclude", "rank_pattern", "alpha_pattern")
    @classmethod
    def _is_regex(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value


class EarlyStopping(Strict):
    """Stop when ``patience`` evaluations in a row have not brought ``eval_loss`` down by more than ``threshold``."""

    patience: Annotated[int, Field(gt=0)] = 3
    threshold: Coefficient = 0.0


class Tasks(Strict):
    """Named tasks or presets of lm-evaluation-harness (`paft.tasks`). ``path``: a directory of task files of your own.

    ``limit``: only the first rows of each; ``shots`` in place of the task's own number; ``chat``: through the chat template;
    ``only``: the rows of the table that are asked (None: all), by the names of their stages, and ``base``.
    """

    names: Annotated[list[str], Field(min_length=1)]
    path: str | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    chat: bool = False
    only: list[str] | None = None


class Evaluation(Strict):
    """What a run measures, and on which split; a joint training also ``trajectory`` times on its way, on validation rows."""

    split: Literal["validation", "test"] = "test"
    rows: Annotated[int, Field(gt=0)] | None = None
    generate: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(gt=0)] = 64
    tasks: Tasks | None = None
    trajectory: Annotated[int, Field(ge=0)] = 0


class Resources(Strict):
    """What a stage needs of the node that it runs on, with ``--executor ray``; ``memory`` in bytes. None: paft's guess."""

    cpus: Annotated[float, Field(ge=0)] | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    memory: Annotated[float, Field(ge=0)] | None = None
