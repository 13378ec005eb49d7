"""Recipes: strict YAML in, typed objects out.

A recipe says what a stage does and nothing about where it runs. Precedence is flag > ``--set`` > file > default; unknown keys are
refused with the line and a did-you-mean. The resolved recipe is what `paft.json` stores. Nothing here imports torch.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paft.errors import NotFoundError, UsageError, did_you_mean
from paft.yamlfile import Document, parse_scalar, read_yaml


class Strict(BaseModel):
    """A recipe node: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Fraction = Annotated[float, Field(ge=0, lt=1)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Lora(Strict):
    """A PEFT LoRA: ΔW = s·B·A with A (r × in), B (out × r), s = alpha/r, or alpha/√r with rslora."""

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False


class TrainRecipe(Strict):
    """What the trainers share. ``trainer`` takes TRL's own options verbatim (SFTConfig or DPOConfig fields)."""

    model: str | None = None
    on: str | None = None
    lora: Lora = Lora()
    l1: Coefficient = 0.0
    l1_scaled: bool = True
    l2: Coefficient = 0.0
    seed: int = 0
    eval_fraction: Fraction = 0.0
    trainer: dict[str, Any] = {}


class SftRecipe(TrainRecipe):
    """SFT: L = CE + l1·Σ|δ| + l2·½Σδ²  (PAFT eq. 1; the L2 term is a control)."""

    kind: Literal["train-sft"] = "train-sft"
    data: str | None = None
    eval_data: str | None = None


class DpoRecipe(TrainRecipe):
    """DPO against the base with the adapter off; TRL's ``loss_type`` may be set under ``trainer``."""

    kind: Literal["train-dpo"] = "train-dpo"
    data: str | None = None
    eval_data: str | None = None
    beta: Annotated[float, Field(gt=0)] = 0.1


class JointRecipe(TrainRecipe):
    """Both objectives in one process: L = lam·DPO + (1-lam)·SFT in each step (Mix). ``trainer`` takes DPOConfig fields."""

    kind: Literal["train-joint"] = "train-joint"
    method: Literal["mix"] = "mix"
    sft_data: str | None = None
    pref_data: str | None = None
    lam: Annotated[float, Field(ge=0, le=1)] = 0.5
    beta: Annotated[float, Field(gt=0)] = 0.1
    sft_batch_size: Annotated[int, Field(gt=0)] | None = None


class MergeRecipe(Strict):
    """Deltas into one model: ``paft methods METHOD`` lists ``parameters``."""

    kind: Literal["merge"] = "merge"
    adapters: list[str] = []
    base: str | None = None
    method: str = "ties"
    parameters: dict[str, Any] = {}
    weights: list[float] | None = None
    dialect: str = "mergekit"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0


class Splits(Strict):
    """Where each split of a data set lies; a missing one is cut from ``train`` by content (see `paft.data.splits`)."""

    train: str
    validation: str | None = None
    test: str | None = None


class RunData(Strict):
    """The two data sets of a run, and neutral text to measure forgetting on."""

    sft: Splits | str
    pref: Splits | str
    text: str | None = None


class RunMerge(Strict):
    """One merge of a run. ``like`` names the adapter whose density or norm the first delta is brought to (the controls)."""

    of: list[str]
    method: str
    parameters: dict[str, Any] = {}
    weights: list[float] | None = None
    density_like: str | None = None
    norm_like: str | None = None
    label: str | None = None


class RunTrain(Strict):
    """One training stage of a run; what is not said comes from the run's ``defaults`` for its objective."""

    objective: Literal["sft", "dpo", "joint"]
    on: str | None = None
    l1: Coefficient | None = None
    l2: Coefficient | None = None
    lam: Annotated[float, Field(ge=0, le=1)] | None = None
    trainer: dict[str, Any] = {}
    label: str | None = None


class Defaults(Strict):
    """Settings that every stage with one objective shares."""

    sft: SftRecipe = SftRecipe()
    dpo: DpoRecipe = DpoRecipe()
    joint: JointRecipe = JointRecipe()


class Evaluation(Strict):
    """What a run measures, and on which split. ``judge`` names a built-in programmatic judge (``demo``)."""

    split: Literal["validation", "test"] = "test"
    rows: Annotated[int, Field(gt=0)] | None = None
    generate: Annotated[int, Field(ge=0)] = 0
    judge: Literal["demo"] | None = None
    batch_size: Annotated[int, Field(gt=0)] = 64


class RunRecipe(Strict):
    """A pipeline: train, merge, evaluate, report (`paft.run`)."""

    kind: Literal["run"] = "run"
    name: str
    model: str
    seed: int = 0
    data: RunData
    defaults: Defaults = Defaults()
    train: dict[str, RunTrain]
    merge: dict[str, RunMerge] = {}
    merge_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    evaluate: Evaluation = Evaluation()


KINDS: dict[str, type[Strict]] = {
    "train-sft": SftRecipe, "train-dpo": DpoRecipe, "train-joint": JointRecipe, "merge": MergeRecipe, "run": RunRecipe,
}

R = TypeVar("R", bound=Strict)


def load(kind: type[R], file: Path | None, sets: tuple[str, ...] = (), flags: dict[str, Any] | None = None) -> R:
    """Build a recipe of ``kind`` from a file, ``--set`` items and flags (None = not given), in rising precedence.

    Raises UsageError with the file's line for a bad key or value, NotFoundError when the file is missing.
    """
    document = read_yaml(file) if file else Document({}, {}, "command line")
    declared = document.data.get("kind")
    expected = kind.model_fields["kind"].default
    if declared is not None and declared != expected:
        raise UsageError(f"{document.name} is a {declared!r} recipe; this command takes {expected!r}",
                         hint=f"use `paft {declared} ...`" if declared in KINDS else did_you_mean(str(declared), KINDS))
    data = document.data
    for item in sets:
        _assign(data, item)
    for key, value in (flags or {}).items():
        if value is not None:
            data[key] = value
    return validate(kind, data, document)


def validate(kind: type[R], data: dict[str, Any], document: Document | None = None) -> R:
    """``kind(**data)`` with a one-line UsageError instead of pydantic's report."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(kind, error, document or Document({}, {}, "recipe")) from None


def kind_of(file: Path) -> str:
    """The ``kind`` a recipe file declares; raises UsageError when it declares none that paft knows."""
    declared = read_yaml(file).data.get("kind")
    if declared not in KINDS:
        raise UsageError(f"{file} declares no known kind ({declared!r})", hint="kind: one of " + ", ".join(KINDS))
    return declared


def _assign(data: dict[str, Any], item: str) -> None:
    """Apply one ``--set a.b=value``; the value is read as YAML, so ``1e-3`` is a number and ``[1, 2]`` a list."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {item!r} is not key=value", hint="for example --set trainer.max_steps=100")
    node = data
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UsageError(f"--set {key}: {part!r} is not a section")
    node[last] = parse_scalar(text)


def _explain(kind: type[Strict], error: ValidationError, document: Document) -> UsageError:
    first = error.errors()[0]
    loc = tuple(part for part in first["loc"])
    where = document.where(loc)
    path = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        return UsageError(f"{where}: unknown key {path!r}", hint=did_you_mean(str(loc[-1]), _keys_at(kind, loc[:-1])))
    if first["type"] == "missing":
        return UsageError(f"{where}: {path!r} is missing", hint=f"add {path}: ... to the recipe, or --set {path}=...")
    return UsageError(f"{where}: {path or 'recipe'}: {first['msg'].lower()}, got {first.get('input')!r}"[:300])


def _keys_at(kind: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the node at ``loc`` would accept."""
    for part in loc:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        if get_origin(kind) in (Union, types.UnionType):
            nodes = [a for a in get_args(kind) if isinstance(a, type) and issubclass(a, BaseModel)]
            kind = nodes[0] if nodes else kind
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def catalog() -> dict[str, Path]:
    """Every shipped recipe by name: ``sft-l1``, ``dpo``, ``ties``, ``demo``, ..."""
    package = Path(__file__).parent
    roots = [package / "_recipes", package.parent]
    found: dict[str, Path] = {}
    for root in roots:
        for folder in ("adapters", "merges"):
            for file in sorted((root / folder).glob("*.yaml")):
                found.setdefault(file.stem, file)
    return found


def find(name: str) -> Path:
    """A recipe by path or by shipped name; NotFoundError with a did-you-mean otherwise."""
    path = Path(name)
    if path.is_file():
        return path
    known = catalog()
    if name in known:
        return known[name]
    raise NotFoundError(f"no recipe {name!r}: neither a file nor a shipped recipe", hint=did_you_mean(name, known))
