"""Tensors taken together: a layer, a module kind, or all of a delta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from paft.report.moments import Moments
from paft.report.spectrum import Spectrum

IDLE_RATIO = 1e-3
_EMPTY = {"hoyer": 1.0, "n_eff": 0.0, "gini": 1.0, "d90": 0.0, "d99": 0.0}


@dataclass(frozen=True)
class TensorSparsity:
    """One tensor; ``layer`` is None where the name holds no integer, ``kind`` is the name's last component."""

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    scale: float
    moments: Moments
    spectrum: Spectrum | None

    def to_dict(self) -> dict[str, Any]:
        head = {"name": self.name, "layer": self.layer, "kind": self.kind, "shape": list(self.shape), "scale": self.scale}
        return head | self.moments.to_dict() | {"spectrum": self.spectrum and self.spectrum.to_dict()}


@dataclass(frozen=True)
class Group:
    """Tensors taken together.

    ``moments`` pools the entries, and so compares entries of all tensors with one another: tensors that are each dense but
    of different scale look sparse when pooled. ``means`` are the scale-free measures inside each tensor, averaged with its
    number of entries as weight. A tensor whose largest entry is at most 1e-3 of the adapter's rms is *idle*: next to the
    others it holds nothing, and it enters the means as an empty one (Hoyer and Gini 1, the rest 0). ``share_active`` is the
    scaled share outside of the idle tensors (1 where all are idle). ``ranks``: stable and effective rank and what a random
    delta of the same shapes shows, means over the tensors that have them and are not idle; ``dead_ranks`` of ``all_ranks``.
    """

    label: str
    tensors: int
    idle: int
    moments: Moments
    means: dict[str, float]
    share_active: float
    ranks: dict[str, float]
    dead_ranks: int
    all_ranks: int

    @property
    def hoyer_mean(self) -> float:
        return self.means["hoyer"]

    @property
    def n_eff_mean(self) -> float:
        return self.means["n_eff"]

    def to_dict(self) -> dict[str, Any]:
        head = {"label": self.label, "tensors": self.tensors, "idle_tensors": self.idle}
        tail = {"tensor_means": self.means, "share_scaled_active": self.share_active, "dead_ranks": self.dead_ranks,
                "ranks": self.all_ranks, "rank_means": self.ranks}
        return head | self.moments.to_dict() | tail


def groups(tensors: Iterable[TensorSparsity], key: Callable[[TensorSparsity], str], rms: float) -> tuple[Group, ...]:
    """One group for each value of ``key``, in the order of first sight; ``rms`` is the whole delta's."""
    members: dict[str, list[TensorSparsity]] = {}
    for tensor in tensors:
        members.setdefault(key(tensor), []).append(tensor)
    return tuple(group(label, found, rms) for label, found in members.items())


def group(label: str, tensors: Sequence[TensorSparsity], rms: float) -> Group:
    """Pool tensors; at least one."""
    pooled = reduce(Moments.__add__, (tensor.moments for tensor in tensors))
    active = [tensor for tensor in tensors if tensor.moments.max > IDLE_RATIO * rms]
    inside = [(tensor.moments.entries, tensor.moments.scale_free()) for tensor in active]
    empty = pooled.entries - sum(entries for entries, _ in inside)
    means = {key: (value * empty + sum(n * (found[key] or 0.0) for n, found in inside)) / pooled.entries
             for key, value in _EMPTY.items()}
    below = sum(tensor.moments.below_scaled for tensor in active) / max(1, pooled.entries - empty)
    spectra = [tensor.spectrum for tensor in active if tensor.spectrum]
    dead = sum(tensor.spectrum.dead for tensor in tensors if tensor.spectrum)
    total = sum(tensor.spectrum.rank or 0 for tensor in tensors if tensor.spectrum)
    return Group(label, len(tensors), len(tensors) - len(active), pooled, means, below if active else 1.0,
                 _ranks(spectra), dead, total)


def _ranks(spectra: Sequence[Spectrum]) -> dict[str, float]:
    if not spectra:
        return {}
    columns = {"stable_rank": [each.stable for each in spectra], "effective_rank": [each.effective for each in spectra],
               "random_stable_rank": [each.random[0] for each in spectra],
               "random_effective_rank": [each.random[1] for each in spectra]}
    return {key: sum(values) / len(values) for key, values in columns.items()}
