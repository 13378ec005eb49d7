"""How sparse is a delta: PAFT's share of small entries, beside measures that do not depend on scale.

PAFT (arXiv 2406.17923, Figure 2) takes δ = B·A of each LoRA module, the share of |δ| < 1e-5 in it, and the mean over
layers. This report gives that, the same of s·δ (what a merge adds), the same over all entries, and beside them rms, max and
norms of s·δ, exact zeros, empty rows and columns, Hoyer, N_eff/N, Gini, d90 and d99, ranks (equations: `moments`,
`spectrum`), with the values of Gaussian and Laplace entries. The share alone cannot tell *sparse* from *small*: the same
dense update shows a few or 100 % of it as the learning rate changes (Adam moves an entry by about the learning rate per
step). The verdict rests on what does not change when δ is rescaled. mergekit and PEFT have no such report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from paft.errors import UsageError
from paft.report.groups import Group, TensorSparsity, group, groups
from paft.report.histogram import Bounded
from paft.report.moments import Moments, measure
from paft.report.passes import Progress, each
from paft.report.reference import GAUSSIAN, LAPLACE
from paft.report.sources import DeltaSource, Part, Source, from_factors
from paft.report.spectrum import spectrum
from paft.report.verdict import Verdict, judge

SCHEMA = 2
THRESHOLD = 1e-5
SWEEP = (1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class SparsityReport:
    """All measures of one delta.

    ``layer_share`` is PAFT's figure, the mean over layers; ``overall.moments.share`` weighs by entries. Tensors outside the
    numbered layers form a layer of their own, labelled "other", that the mean over layers leaves out (unless there is no
    numbered layer).
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
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def note(self) -> str | None:
        """What an adapter changes beside s·B·A, counted, or None: the measures know nothing of it."""
        kinds: dict[str, list[str]] = {}
        for name, what in self.left_out.items():
            kinds.setdefault(what, []).append(name)
        listed = [f"{what} ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})" for what, names in kinds.items()]
        return f"not measured: {'; '.join(listed)}" if listed else None

    @property
    def sweep(self) -> dict[float, Bounded]:
        """Share of |s·δ| below each of 1e-8, 3e-8 ... 1e-2."""
        return {threshold: self.overall.moments.histogram.share_below(threshold) for threshold in SWEEP}

    def matched(self, rms: float) -> Bounded:
        """The share of |s·δ| below the threshold if δ were rescaled to this rms, which takes the learning rate out."""
        moments = self.overall.moments
        return moments.histogram.share_below(self.threshold * moments.rms / rms) if rms else Bounded(1.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; paft/report/SCHEMA.md says what the keys mean, ``schema`` changes when one changes or goes."""
        layer_means = {"share_unscaled_layer_mean": self.layer_share, "share_scaled_layer_mean": self.layer_share_scaled}
        lower, counts = self.overall.moments.histogram.octaves()
        return {
            "schema": SCHEMA,
            "kind": "sparsity",
            "name": self.name,
            "threshold": self.threshold,
            **self.verdict.to_dict(),
            "gaussian": GAUSSIAN.to_dict(),
            "laplace": LAPLACE.to_dict(),
            "overall": self.overall.to_dict() | layer_means,
            "sweep": [{"threshold": t, "share_scaled": each.value, "bound": each.bound} for t, each in self.sweep.items()],
            "histogram": {"lower_edges": lower.tolist(), "counts": [int(count) for count in counts]},
            "layers": [group.to_dict() for group in self.layers],
            "kinds": [group.to_dict() for group in self.kinds],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "left_out": dict(self.left_out),
            "about": dict(self.about),
        }


def sparsity(
    delta_source: DeltaSource | Source, *, threshold: float = THRESHOLD, tile_rows: int | None = None,
    threads: int | None = None, progress: Progress | None = None,
) -> SparsityReport:
    """Measure an adapter, model or delta file; memory is some tiles, whatever the size of the model.

    ``threshold`` is PAFT's 1e-5, in units of weights; ``tile_rows`` the rows of a block of a product; ``threads`` (one a
    core) the tensors at work, which changes no number. Raises UsageError for a threshold that is not a positive number,
    MismatchError for an adapter without LoRA factors or with NaN or infinity in them. What an adapter holds beside its
    factors and is not measured without its base (DoRA's magnitudes, replaced tensors, biases) is in ``left_out``.
    """
    if not (math.isfinite(threshold) and threshold > 0):
        raise UsageError(f"threshold {threshold} is not a positive number", hint="PAFT uses --threshold 1e-5")
    if tile_rows is not None and tile_rows < 1:
        raise UsageError(f"tile_rows {tile_rows} is not a positive number", hint="leave it out for the default")
    source = delta_source if isinstance(delta_source, Source) else from_factors(delta_source)
    tensors = tuple(each(source.parts, lambda part: _measure(part, threshold, tile_rows), threads, progress))
    rms = reduce(Moments.__add__, (tensor.moments for tensor in tensors)).rms
    in_order = sorted(tensors, key=lambda tensor: (tensor.layer is None, tensor.layer or 0))
    layers = groups(in_order, lambda tensor: "other" if tensor.layer is None else str(tensor.layer), rms)
    numbered = [group.moments for group in layers if group.label != "other"] or [layers[0].moments]
    overall = group("all", tensors, rms)
    return SparsityReport(
        name=source.name,
        threshold=threshold,
        tensors=tensors,
        layers=layers,
        kinds=groups(tensors, lambda tensor: tensor.kind, rms),
        overall=overall,
        layer_share=sum(moments.share for moments in numbered) / len(numbered),
        layer_share_scaled=sum(moments.share_scaled for moments in numbered) / len(numbered),
        verdict=judge(overall, threshold),
        left_out=source.left_out,
        about=source.about,
    )


def _measure(part: Part, threshold: float, tile_rows: int | None) -> TensorSparsity:
    moments = measure(part, threshold, tile_rows)
    return TensorSparsity(part.name, part.layer, part.kind, (part.rows, part.columns), part.scale, moments, spectrum(part))
