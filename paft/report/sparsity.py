"""How sparse is an adapter: PAFT's share of small entries, beside measures that do not depend on scale.

PAFT (arXiv 2406.17923, Figure 2) takes δ = B·A of each LoRA module, the share of |δ| < 1e-5 in it, and the mean over
layers. This report gives that, the same of s·δ (what a merge adds), the same over all entries, and beside them rms,
max and norms of s·δ, exact zeros, Hoyer and N_eff/N with their Gaussian values (equations: `moments`). The share
alone cannot tell *sparse* from *small*: the same dense update shows a few or 100 % of it as the learning rate changes
(Adam moves an entry by about the learning rate per step). Hoyer and N_eff/N do not change when δ is rescaled, so the
verdict rests on them. mergekit and PEFT have no such report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, Protocol

from paft.errors import MismatchError, UsageError
from paft.report.moments import GAUSSIAN_HOYER, GAUSSIAN_N_EFF, FactorsLike, Moments, measure

SCHEMA = 1
THRESHOLD = 1e-5
DEAD_MAX = 1e-9
IDLE_RATIO = 1e-3
SPARSE_SUPPORT = 1 / 3
SMALL_SHARE = 0.5

Word = Literal["sparse", "small", "dense", "dead"]


class DeltaSource(Protocol):
    """A named set of LoRA modules, as ``paft.adapter.read_adapter`` returns it."""

    @property
    def name(self) -> str: ...
    @property
    def factors(self) -> Mapping[str, FactorsLike]: ...


@dataclass(frozen=True)
class TensorSparsity:
    """One module; ``layer`` is None where the name holds no integer, ``kind`` is the name's last component."""

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float
    moments: Moments

    def to_dict(self) -> dict[str, Any]:
        head = {"name": self.name, "layer": self.layer, "kind": self.kind, "shape": list(self.shape)}
        return head | {"rank": self.rank, "scale": self.scale} | self.moments.to_dict()


@dataclass(frozen=True)
class Group:
    """Tensors taken together: a layer, a module kind, or all.

    The pooled ``moments.hoyer`` and ``moments.n_eff`` compare entries of all tensors with one another, so tensors
    that are each dense but of different scale look sparse when pooled. ``hoyer_mean`` and ``n_eff_mean`` are measured
    inside each tensor and averaged with its number of entries as weight. A tensor whose largest entry is at most 1e-3
    of the adapter's rms is *idle*: next to the others it holds nothing, and it enters the means as an empty one
    (Hoyer 1, N_eff 0). ``share_active`` is the scaled share outside
    the idle tensors (1 where all are idle).
    """

    label: str
    tensors: int
    idle: int
    moments: Moments
    hoyer_mean: float
    n_eff_mean: float
    share_active: float

    def to_dict(self) -> dict[str, Any]:
        head = {"label": self.label, "tensors": self.tensors, "idle_tensors": self.idle}
        means = {"hoyer_mean": self.hoyer_mean, "n_eff_mean": self.n_eff_mean}
        return head | self.moments.to_dict() | means | {"share_scaled_active": self.share_active}


@dataclass(frozen=True)
class Verdict:
    """One word, and one sentence with the numbers behind it; `judge` holds the rule."""

    word: Word
    sentence: str


@dataclass(frozen=True)
class SparsityReport:
    """All measures of one adapter.

    ``layer_share`` is PAFT's figure, the mean over layers; ``overall.moments.share`` weighs by entries. Tensors
    outside the numbered layers form a layer of their own, labelled "other", that the mean over layers leaves out
    (unless there is no numbered layer).
    """

    name: str
    threshold: float
    tensors: tuple[TensorSparsity, ...]
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    overall: Group
    layer_share: float
    layer_share_scaled: float
    verdict: Verdict
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str | None:
        """What an adapter changes beside s·B·A, counted, or None: the measures know nothing of it."""
        kinds: dict[str, list[str]] = {}
        for name, what in self.left_out.items():
            kinds.setdefault(what, []).append(name)
        listed = [f"{what} ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})" for what, names in kinds.items()]
        return f"not measured: {'; '.join(listed)}" if listed else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``schema`` changes when a key changes its meaning or goes."""
        layer_means = {
            "share_unscaled_layer_mean": self.layer_share,
            "share_scaled_layer_mean": self.layer_share_scaled,
        }
        return {
            "schema": SCHEMA,
            "name": self.name,
            "threshold": self.threshold,
            "verdict": self.verdict.word,
            "verdict_sentence": self.verdict.sentence,
            "gaussian": {"hoyer": GAUSSIAN_HOYER, "n_eff": GAUSSIAN_N_EFF},
            "overall": self.overall.to_dict() | layer_means,
            "layers": [group.to_dict() for group in self.layers],
            "kinds": [group.to_dict() for group in self.kinds],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "left_out": dict(self.left_out),
        }


def sparsity(
    delta_source: DeltaSource, *, threshold: float = THRESHOLD, tile_rows: int | None = None
) -> SparsityReport:
    """Measure an adapter from its factors; memory is one tile (by default 2 MB), whatever the size of the model.

    ``threshold`` is PAFT's 1e-5, in units of weights; ``tile_rows`` the rows of a tile. Raises UsageError for a
    threshold that is not a positive number, MismatchError for an adapter without LoRA factors or with NaN or infinity
    in them. What an adapter holds beside its factors (DoRA's magnitudes, replaced tensors, biases) is in ``left_out``.
    """
    if not (math.isfinite(threshold) and threshold > 0):
        raise UsageError(f"threshold {threshold} is not a positive number", hint="PAFT uses --threshold 1e-5")
    if tile_rows is not None and tile_rows < 1:
        raise UsageError(f"tile_rows {tile_rows} is not a positive number", hint="leave it out for the default")
    if not delta_source.factors:
        raise MismatchError(f"{delta_source.name} holds no LoRA factors", hint="sparsity is measured on LoRA adapters")
    tensors = tuple(_measure(name, factors, threshold, tile_rows) for name, factors in delta_source.factors.items())
    rms = reduce(Moments.__add__, (tensor.moments for tensor in tensors)).rms
    in_order = sorted(tensors, key=lambda tensor: (tensor.layer is None, tensor.layer or 0))
    layers = _groups(in_order, lambda tensor: "other" if tensor.layer is None else str(tensor.layer), rms)
    numbered = [group.moments for group in layers if group.label != "other"] or [layers[0].moments]
    overall = _group("all", tensors, rms)
    return SparsityReport(
        name=delta_source.name,
        threshold=threshold,
        tensors=tensors,
        layers=layers,
        kinds=_groups(tensors, lambda tensor: tensor.kind, rms),
        overall=overall,
        layer_share=sum(moments.share for moments in numbered) / len(numbered),
        layer_share_scaled=sum(moments.share_scaled for moments in numbered) / len(numbered),
        verdict=judge(overall, threshold),
        left_out=getattr(delta_source, "beside", {}),
    )


def judge(overall: Group, threshold: float) -> Verdict:
    """Call a delta dead, sparse, small or dense; the first rule that holds decides.

    1. *dead*: max|s·δ| < 1e-9. Half a unit in the last place of a float32 weight of 0.02 is 9.3e-10,
       so adding the delta changes nothing.
    2. *sparse*: N_eff/N, as the mean over tensors, is below a third of the Gaussian 2/π, that is 0.212 (Hoyer above
       0.54): what a Gaussian delta shows with more than two thirds of its entries removed at random. Rescaling δ
       cannot change this.
    3. *small*: outside idle tensors at least half of |s·δ| lies below the threshold although rule 2 does not hold: it
       is the scale that makes it look sparse.
    4. *dense*: the rest.
    """
    moments, n_eff = overall.moments, overall.n_eff_mean
    spread = f"N_eff/N is {n_eff:.3f}, that of a Gaussian {GAUSSIAN_N_EFF:.3f}"
    share = f"{moments.share_scaled:.1%} of the entries are below {short(threshold)}"
    idle = f"; {overall.idle} of {overall.tensors} tensors are idle" if overall.idle else ""
    if moments.max < DEAD_MAX:
        return Verdict("dead", f"dead: the largest entry is {moments.max:.1e}, too small to change a weight.")
    if n_eff < SPARSE_SUPPORT * GAUSSIAN_N_EFF:
        return Verdict("sparse", f"sparse: few entries hold the update at any scale ({spread}{idle}); {share}.")
    if overall.share_active >= SMALL_SHARE:
        return Verdict("small", f"small, not sparse: {share} because the rms is {moments.rms:.1e}, but {spread}{idle}.")
    return Verdict("dense", f"dense: {share} and {spread}{idle}.")


def short(threshold: float) -> str:
    """1e-5 rather than 1e-05."""
    return f"{threshold:g}".replace("e-0", "e-")


def _measure(name: str, factors: FactorsLike, threshold: float, tile_rows: int | None) -> TensorSparsity:
    if not (math.isfinite(factors.scale) and bool(factors.A.isfinite().all()) and bool(factors.B.isfinite().all())):
        raise MismatchError(f"{name} holds NaN or infinity", hint="the training diverged; use an earlier checkpoint")
    moments = measure(factors, threshold, tile_rows)
    components = name.split(".")
    layer = next((int(part) for part in components if part.isdecimal()), None)
    shape = (factors.B.shape[0], factors.A.shape[1])
    return TensorSparsity(name, layer, components[-1], shape, factors.A.shape[0], float(factors.scale), moments)


def _groups(tensors: Iterable[TensorSparsity], key: Callable[[TensorSparsity], str], rms: float) -> tuple[Group, ...]:
    members: dict[str, list[TensorSparsity]] = {}
    for tensor in tensors:
        members.setdefault(key(tensor), []).append(tensor)
    return tuple(_group(label, group, rms) for label, group in members.items())


def _group(label: str, tensors: Iterable[TensorSparsity], rms: float) -> Group:
    moments = [tensor.moments for tensor in tensors]
    pooled = reduce(Moments.__add__, moments)
    active = [one for one in moments if one.max > IDLE_RATIO * rms]
    n_eff = sum(one.entries * (one.n_eff or 0.0) for one in active) / pooled.entries
    empty = pooled.entries - sum(one.entries for one in active)
    hoyer = (empty + sum(one.entries * (one.hoyer or 0.0) for one in active)) / pooled.entries
    share = reduce(Moments.__add__, active).share_scaled if active else 1.0
    return Group(label, len(moments), len(moments) - len(active), pooled, hoyer, n_eff, share)
