"""Recipes: strict YAML in, typed objects out.

A recipe says what a stage does and nothing about where it runs. Precedence is flag > ``--set`` > file > default; unknown keys are
refused with the line and a did-you-mean. The resolved recipe is what `paft.json` stores. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from paft.complaint import explain
from paft.errors import UsageError, did_you_mean
from paft.sections import Coefficient, EarlyStopping, Evaluation, Fraction, Lora, Resources, Strict
from paft.yamlfile import Document, parse_scalar, read_yaml


class DataSource(Strict):
    """One of several data sets. ``weight``: its share of the mixture; ``rows``: only its first; ``columns``: our name -> its."""

    source: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    rows: Annotated[int, Field(gt=0)] | None = None
    columns: dict[str, str] = {}


Sources = str | list[str | DataSource]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # numpy takes no other


class TrainRecipe(Strict):
    """What the trainers share. ``trainer`` takes TRL's own options verbatim (SFTConfig or DPOConfig fields).

    ``full`` trains every weight instead of a LoRA; then ``lora`` has no use, and the result is a model. ``dtype`` is that of the
    frozen base, ``quantize: 4bit`` stores its linear layers as NF4 (QLoRA); what is trained is float32 always. ``streaming``: the
    data are never held in memory.
    """

    model: str | None = None
    on: str | None = None
    full: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["4bit"] | None = None
    lora: Lora = Lora()
    l1: Coefficient = 0.0
    l1_scaled: bool = True
    l1_solver: Literal["subgradient", "proximal"] = "subgradient"
    l1_warmup: Coefficient = 0.0
    l1_target_sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    l2: Coefficient = 0.0
    seed: Seed = 0
    streaming: bool = False
    eval_fraction: Fraction = 0.0
    early_stopping: EarlyStopping | None = None
    chat_template: str | None = None
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    trainer: dict[str, Any] = {}


class DataRecipe(TrainRecipe):
    """Trainers of one data set (or mixture). ``columns``: our column name -> its."""

    data: Sources | None = None
    eval_data: Sources | None = None
    columns: dict[str, str] = {}


class SftRecipe(DataRecipe):
    """SFT: L = CE + l1·Σ|δ| + l2·½Σδ²  (PAFT eq. 1; the L2 term is a control)."""

    kind: Literal["train-sft"] = "train-sft"


BETAS = {"simpo": 2.0}  # SimPO's β scales a mean over tokens, the others' a sum: 0.1 would hardly train


def _weighted(loss: Any) -> Any:
    """``sigmoid`` and ``[sigmoid, sft]`` as {name: weight}, with weight 1; anything else as it is."""
    names = [loss] if isinstance(loss, str) else loss
    return dict.fromkeys(names, 1.0) if isinstance(names, list) and all(isinstance(name, str) for name in names) else loss


class PreferenceRecipe(TrainRecipe):
    """What preference training needs: ``loss`` is a name, a list, or names with weights (`paft.train.losses`); ``reference`` says
    what π_ref is (`paft.train.reference`), and ``reference_sft`` are SFTConfig fields for the training of ``chosen-sft``."""

    loss: Annotated[dict[str, Coefficient], BeforeValidator(_weighted)] = {"sigmoid": 1.0}
    reference: str | None = None
    reference_sft: dict[str, Any] = {}
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default_factory=lambda said: BETAS.get(" ".join(said.get("loss", ())), 0.1))


class DpoRecipe(DataRecipe, PreferenceRecipe):
    """Preference training on one data set."""

    kind: Literal["train-dpo"] = "train-dpo"


Finite = Annotated[float, Field(allow_inf_nan=False)]


class JointRecipe(PreferenceRecipe):
    """Both objectives in one process: ``lam`` weights DPO, by ``method`` (`paft.train.schedules`, `paft.train.uft`).

    ``max_eval_steps`` is MAXRIGHT's k and ``smoothing`` that of its gaps; ``sft_opt`` and ``dpo_opt`` are f*, or
    ``estimate_optima`` (`paft.train.optima`). ``max_tokens`` is a budget in place of ``trainer.max_steps``. ``stop_front`` ends
    a training that does as well as the log of another (`paft.train.front`). ``uft_loss`` is UFT's distance of σ(β·log π/π_ref)
    from the target: squared error (the paper's) or cross-entropy; its ``lam`` is the share of feedback rows among all, a pair
    counting as two. ``trainer`` takes DPOConfig fields, with UFT KTOConfig's; without ``disable_dropout: false`` no dropout acts.
    ``sft_trainer`` takes the fields of SFTConfig that say what is made of SFT rows (`paft.train.joint.SFT_OPTIONS`).
    """

    kind: Literal["train-joint"] = "train-joint"
    method: Literal["mix", "sequential", "alright", "maxright", "uft"] = "mix"
    sft_data: Sources | None = None
    pref_data: Sources | None = None
    sft_eval_data: Sources | None = None
    pref_eval_data: Sources | None = None
    sft_columns: dict[str, str] = {}
    pref_columns: dict[str, str] = {}
    lam: Annotated[float, Field(ge=0, le=1)] = 0.5
    order: Literal["dpo-sft", "sft-dpo"] = "dpo-sft"
    max_eval_steps: Annotated[int, Field(gt=0)] = 10
    smoothing: Fraction = 0.0
    sft_opt: Finite | None = None
    dpo_opt: Finite | None = None
    estimate_optima: bool = False
    stop_front: str | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    uft_loss: Literal["mse", "bce"] = "mse"
    sft_batch_size: Annotated[int, Field(gt=0)] | None = None
    sft_trainer: dict[str, Any] = {}


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
    seed: Seed = 0
    engine: Literal["paft", "mergekit"] = "paft"


class Splits(Strict):
    """Where each split of a data set lies; a missing one is cut from ``train`` by content (see `paft.data.splits`)."""

    train: Sources
    validation: Sources | None = None
    test: Sources | None = None


class RunData(Strict):
    """The two data sets of a run, and neutral text to measure forgetting on."""

    sft: Splits | Sources
    pref: Splits | Sources
    text: str | None = None


class RunMerge(Strict):
    """One merge of a run. ``density_like``, ``norm_like``: bring the first delta to that adapter's density, then to that norm."""

    of: list[str]
    method: str
    parameters: dict[str, Any] = {}
    weights: list[float] | None = None
    density_like: str | None = None
    norm_like: str | None = None
    label: str | None = None


class RunTrain(Strict):
    """One training stage of a run; what is not said comes from the run's ``defaults`` for its objective.

    The keys from ``beta`` on are those of preference training and of joint training.
    """

    objective: Literal["sft", "dpo", "joint"]
    on: str | None = None
    l1: Coefficient | None = None
    l1_solver: Literal["subgradient", "proximal"] | None = None
    l1_warmup: Coefficient | None = None
    l1_target_sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    l2: Coefficient | None = None
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    loss: str | dict[str, Coefficient] | None = None
    reference: str | None = None
    method: str | None = None
    lam: Annotated[float, Field(ge=0, le=1)] | None = None
    order: str | None = None
    max_eval_steps: Annotated[int, Field(gt=0)] | None = None
    estimate_optima: bool | None = None
    uft_loss: str | None = None
    sft_batch_size: Annotated[int, Field(gt=0)] | None = None
    trainer: dict[str, Any] = {}
    label: str | None = None
    resources: Resources | None = None


class Defaults(Strict):
    """Settings that every stage with one objective shares."""

    sft: SftRecipe = SftRecipe()
    dpo: DpoRecipe = DpoRecipe()
    joint: JointRecipe = JointRecipe()


class RunRecipe(Strict):
    """A pipeline: train, merge, evaluate, report (`paft.run`)."""

    kind: Literal["run"] = "run"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # a directory under merges/
    model: str
    seed: Seed = 0
    data: RunData
    defaults: Defaults = Defaults()
    train: dict[str, RunTrain]
    merge: dict[str, RunMerge] = {}
    merge_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    chat_template: str | None = None
    on_bad_row: Literal["refuse", "drop"] = "refuse"
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
        raise explain(kind, error, document or Document({}, {}, "recipe")) from None


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
