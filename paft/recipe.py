"""Recipes: strict YAML in, typed objects out.

A recipe says what a stage does and nothing about where it runs. Precedence is flag > ``--set`` > file > default; unknown keys are
refused with the line and a did-you-mean. The resolved recipe is what `paft.json` stores. Nothing here imports torch.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paft.errors import UsageError, did_you_mean
from paft.yamlfile import Document, parse_scalar, read_yaml


class Strict(BaseModel):
    """A recipe node: unknown keys are errors, ``true`` is no number, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
    l1_solver: Literal["subgradient", "proximal"] = "subgradient"
    l1_warmup: Coefficient = 0.0
    l1_target_sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
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
    """Deltas into one model: ``paft methods METHOD`` lists ``parameters``; `paft.merge.settings` says how they may vary."""

    kind: Literal["merge"] = "merge"
    adapters: list[str | dict[str, Any]] = []
    base: str | None = None
    method: str = "ties"
    parameters: dict[str, Any] = {}
    weights: list[float] | None = None
    dialect: str = "mergekit"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0
    engine: Literal["paft", "mergekit"] = "paft"


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
    """One merge of a run. ``density_like`` / ``norm_like``: bring the first delta to that adapter's density or norm."""

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
    l1_solver: Literal["subgradient", "proximal"] | None = None
    l1_warmup: Coefficient | None = None
    l1_target_sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
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
    """What a run measures, and on which split."""

    split: Literal["validation", "test"] = "test"
    rows: Annotated[int, Field(gt=0)] | None = None
    generate: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(gt=0)] = 64


class RunRecipe(Strict):
    """A pipeline: train, merge, evaluate, report (`paft.run`)."""

    kind: Literal["run"] = "run"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # a directory under merges/
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
    amend(kind, document, sets, flags)
    return validate(kind, document.data, document)


def amend(kind: type[Strict], document: Document, sets: tuple[str, ...], flags: dict[str, Any] | None) -> None:
    """Write ``--set`` items and flags (None = not given) into a document of ``kind``, with themselves as their lines."""
    declared = document.data.get("kind")
    expected = kind.model_fields["kind"].default
    if declared is not None and declared != expected:
        raise UsageError(f"{document.name} is a {declared!r} recipe; this command takes {expected!r}",
                         hint=f"use `paft {declared} ...`" if str(declared) in KINDS else did_you_mean(str(declared), KINDS))
    for item in sets:
        _assign(document, item)
    for key, value in (flags or {}).items():
        if value is not None:
            document.data[key] = value
            _blame(document, (key,), "--" + key.replace("_", "-"))


def validate(kind: type[R], data: dict[str, Any], document: Document | None = None) -> R:
    """``kind(**data)`` with a one-line UsageError instead of pydantic's report."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(kind, error, document or Document({}, {}, "recipe")) from None


def _assign(document: Document, item: str) -> None:
    """Apply one ``--set a.b=value``; the value is read as YAML, so ``1e-3`` is a number and ``[1, 2]`` a list."""
    key, equals, text = item.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {item!r} is not key=value", hint="for example --set trainer.max_steps=100")
    node = document.data
    *parents, last = path = key.split(".")
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UsageError(f"--set {key}: {part!r} is a value, not a section", hint=f"set {part} itself, or leave it out")
    node[last] = parse_scalar(text)
    _blame(document, tuple(path), f"--set {item}")


def _blame(document: Document, path: tuple[str, ...], flag: str) -> None:
    """What stands at ``path`` and below came from ``flag``, not from the file."""
    for known in [known for known in document.lines if known[: len(path)] == path]:
        del document.lines[known]
    document.lines[path] = flag


def _explain(kind: type[Strict], error: ValidationError, document: Document) -> UsageError:
    """The first complaint in one line, a misspelt key before its absence; all missing keys at once."""
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first = errors[0]
    loc, _ = _walk(kind, first["loc"])
    path, where = ".".join(map(str, loc)), document.where(loc)
    if first["type"] == "extra_forbidden":
        return UsageError(f"{where}: unknown key {path!r}", hint=did_you_mean(str(loc[-1]), _keys_at(kind, first["loc"][:-1])))
    if first["type"] == "missing":
        missing = [".".join(map(str, _walk(kind, e["loc"])[0])) for e in errors if e["type"] == "missing"]
        verb = "is" if len(missing) == 1 else "are"
        return UsageError(f"{where}: {', '.join(missing)} {verb} missing", hint=" ".join(f"--set {name}=..." for name in missing))
    sections = ("model_type", "dict_type", "model_attributes_type")
    said = "should be a section of keys and values" if first["type"] in sections else first["msg"][0].lower() + first["msg"][1:]
    return UsageError(f"{where}: {path or 'recipe'}: {said}, got {first.get('input')!r}"[:300])


def _walk(kind: Any, loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """(``loc`` without the names that pydantic adds for the members of a union, the type it leads to or None)."""
    clean: list[int | str] = []
    for part in loc:
        members = [one for one in get_args(kind) if one is not types.NoneType] if _is_union(kind) else []
        if len(members) > 1:
            kind = next((one for one in members if getattr(one, "__name__", "") == part), members[-1])
            continue
        kind = members[0] if members else kind
        clean.append(part)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        else:
            kind = get_args(kind)[-1] if get_args(kind) else None
    return tuple(clean), kind


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _keys_at(kind: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the node at ``loc`` would accept."""
    found = _walk(kind, loc)[1]
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []
