"""What is measured: an adapter, a fine-tuned model or a delta file as named parts, each a delta that is read by blocks.

    adapter without base   each LoRA module's s·B·A from its factors; what stands beside them is named as left out
    adapter with base      all that it changes, DoRA, replaced tensors, biases and rows too
    model, delta file      every tensor that differs; both need their base (a delta file names it)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from paft import hub
from paft.adapter import CONFIG, PATTERNS, Adapter, read_adapter
from paft.checkpoint import Checkpoint, read_json
from paft.delta import Delta, FullDelta, LoraDelta, ProductTensor, Tiled, spans, tile_rows
from paft.errors import MismatchError, NotFoundError
from paft.merge.deltafile import PATTERNS as DELTA_PATTERNS
from paft.merge.deltafile import is_delta
from paft.merge.inputs import open_inputs
from paft.merge.merged import factors as product_factors
from paft.report.scan import Block

BLOCK = (128, 512)  # rows and columns of a product's block: half a MB of float64, in the second-level cache
Pair = tuple[Tensor, Tensor]


class FactorsLike(Protocol):
    """One LoRA module: ``A`` [r, n], ``B`` [m, r] and the scale s of s·B·A."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...


class DeltaSource(Protocol):
    """A named set of LoRA modules, as ``paft.adapter.read_adapter`` returns it."""

    @property
    def name(self) -> str: ...
    @property
    def factors(self) -> Mapping[str, FactorsLike]: ...


@dataclass(frozen=True)
class Part:
    """One tensor's delta s·δ. ``pair`` reads δ's factors ([m, r], [r, n], without s) where it is a product, else None;
    ``tiled`` reads s·δ by row tiles in float32, as a merge does; ``weight`` is the base's tensor and its name there, ``stored``
    the type of the fine-tuned tensor where δ is the difference of the two.
    """

    name: str
    rows: int
    columns: int
    scale: float
    pair: Callable[[], Pair] | None
    tiled: Callable[[], Tiled]
    weight: tuple[Checkpoint, str] | None = None
    stored: str | None = None

    @property
    def layer(self) -> int | None:
        """The first integer in the name."""
        return next((int(part) for part in self.name.split(".") if part.isdecimal()), None)

    @property
    def kind(self) -> str:
        """The name's last component that is not ``weight``."""
        return self.name.removesuffix(".weight").rpartition(".")[2]

    @property
    def entries(self) -> int:
        return self.rows * self.columns

    def factors(self) -> Pair | None:
        """δ's factors in float64. Raises MismatchError where they are not finite."""
        if self.pair is None:
            return None
        left, right = (factor.detach().cpu().double() for factor in self.pair())
        if not (torch.isfinite(left).all() and torch.isfinite(right).all() and abs(self.scale) < float("inf")):
            raise MismatchError(f"{self.name} holds NaN or infinity", hint="the training diverged; use an earlier checkpoint")
        return left, right

    def blocks(self, rows: int | None = None) -> Iterator[Block]:
        """δ in blocks that cover it: a product in float64, ``rows`` at a time, else s·δ's own row tiles (then s = 1)."""
        pair = self.factors()
        if pair is None:
            tensor = self.tiled()
            for start, stop in spans(tensor):
                yield start, 0, tensor.tile(start, stop).numpy()
            return
        height, width = rows or BLOCK[0], BLOCK[1]
        rights = [(first, pair[1][:, first : first + width].contiguous()) for first in range(0, self.columns, width)]
        for start in range(0, self.rows, height):
            left = pair[0][start : start + height]
            for first, right in rights:
                yield start, first, (left @ right).numpy()


@dataclass(frozen=True)
class Source:
    """A named set of parts. ``left_out``: what the parts do not say, name -> what it is; ``about``: where it came from."""

    name: str
    parts: Sequence[Part]
    left_out: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def open_source(name: str, base: str | None = None, *, allow_base_mismatch: bool = False) -> Source:
    """Open an adapter, a model or a delta file, by path or hub id; ``base`` is needed for a model.

    Raises NotFoundError for what is none of these, UsageError for a model without its base, MismatchError for what is
    damaged, empty, of another kind (IA3, prompt tuning) or does not fit the base.
    """
    directory = hub.resolve(name, kind="adapter", patterns=[*PATTERNS, *DELTA_PATTERNS, "config.json", "trainer_state.json"])
    if (directory / CONFIG).is_file() and not is_delta(directory) and base is None:
        return from_factors(read_adapter(name))
    if not (is_delta(directory) or (directory / CONFIG).is_file() or (directory / "config.json").is_file()):
        inside = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG}"))
        raise NotFoundError(f"{name} is no adapter, model or delta file: no {CONFIG}, no config.json",
                            hint=f"did you mean {Path(name) / inside[-1]}?" if inside else "name the directory that holds it")
    opened = open_inputs([name], base, allow_base_mismatch=allow_base_mismatch)
    return from_delta(opened.names[0], opened.deltas[0], opened.base)


def open_sources(names: Sequence[str], base: str | None = None, *, allow_base_mismatch: bool = False) -> list[Source]:
    """`open_source` of each; those that would be called alike get as much of their paths as tells them apart."""
    opened = [open_source(name, base, allow_base_mismatch=allow_base_mismatch) for name in names]
    labels = [source.name for source in opened]
    for depth in range(2, 12):
        labels = [label if labels.count(label) == 1 else "/".join(Path(name).expanduser().resolve().parts[-depth:])
                  for label, name in zip(labels, names, strict=True)]
    labels = [label if label not in labels[:index] else f"{label} ({index + 1})" for index, label in enumerate(labels)]
    return [replace(source, name=label) for source, label in zip(opened, labels, strict=True)]


def from_factors(source: DeltaSource) -> Source:
    """The LoRA modules of an adapter, without its base. Raises MismatchError where there are none."""
    if not source.factors:
        raise MismatchError(f"{source.name} holds no LoRA factors",
                            hint="pass --base to measure the tensors that it replaces" if getattr(source, "beside", None) else
                            "sparsity is measured on LoRA adapters, models and delta files")
    parts = [_module(name, factors) for name, factors in source.factors.items()]
    return Source(source.name, parts, getattr(source, "beside", {}), _about(source))


def _module(name: str, factors: FactorsLike, shape: tuple[int, int] | None = None, *, transposed: bool = False,
            weight: tuple[Checkpoint, str] | None = None) -> Part:
    def pair() -> Pair:
        left, right = factors.B, factors.A
        return (right.T, left.T) if transposed else (left, right)

    def tiled() -> Tiled:
        left, right = pair()
        step = tile_rows(right.shape[1], 1 << 18)
        return ProductTensor((left.float() * factors.scale).contiguous(), right.float().contiguous(), step, name)

    rows, columns = shape or (factors.B.shape[0], factors.A.shape[1])
    return Part(name, rows, columns, float(factors.scale), pair, tiled, weight)


def from_delta(name: str, delta: Delta, base: Checkpoint) -> Source:
    """Everything that a delta changes in its base; a tensor without entries is skipped."""
    parts = [_tensor(each, delta, base) for each in delta.names if base.entries[each].rows * base.entries[each].columns]
    return Source(name, parts, {}, _about(delta.adapter) if isinstance(delta, LoraDelta) else {})


def _tensor(name: str, delta: Delta, base: Checkpoint) -> Part:
    entry = base.entries[name]
    if isinstance(delta, LoraDelta) and name in delta.modules:
        part: Any = delta.parts[name][0]
        return _module(delta.modules[name], part.factors, (entry.rows, entry.columns), transposed=part.transposed,
                       weight=(base, name))
    tensor = partial(delta.tensor, name)
    product = product_factors(tensor()) is not None

    def pair() -> Pair:
        found = product_factors(tensor())
        assert found is not None
        return found

    stored = delta.tuned.entries[name].dtype if isinstance(delta, FullDelta) else None
    return Part(name.removesuffix(".weight"), entry.rows, entry.columns, 1.0, pair if product else None, tensor, (base, name),
                stored)


def _about(adapter: Any) -> dict[str, Any]:
    """What an adapter's files say of its training, where they say it: base, rank, alpha, learning rate, steps."""
    if not isinstance(adapter, Adapter):
        return {}
    config, made, state = adapter.config, _json(adapter.path / "paft.json"), _json(adapter.path / "trainer_state.json")
    logged = [row["learning_rate"] for row in state.get("log_history") or [] if "learning_rate" in row]
    rates = [_in(made, "resolved").get("learning_rate"), _in(_in(made, "recipe"), "trainer").get("learning_rate")]
    found = {
        "base": adapter.base_model, "rank": config.get("r"), "alpha": config.get("lora_alpha"),
        "rslora": bool(config.get("use_rslora")), "learning_rate": rates[0] or rates[1] or max(logged, default=None),
        "steps": _in(made, "metrics").get("steps") or state.get("global_step"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _in(data: dict[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    """A file that only tells more: what cannot be read tells nothing."""
    try:
        return read_json(file)
    except (MismatchError, NotFoundError):
        return {}
