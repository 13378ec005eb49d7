"""The functional test of a sparsity report: what the held-out loss says when a delta is on, pruned, scaled and off.

    off      W                      half, double   W + s·δ/2,  W + 2·s·δ
    on       W + s·δ                pruned         W + the largest entries of s·δ that hold 90 % of its energy, tensor by tensor

A delta of which d90 of the entries do all the work is sparse in the sense that matters; one whose half does the same work is
larger than it needs to be; one that changes nothing is near zero, whatever its shares say. The loss is the cross-entropy a
token of SFT rows, or the DPO loss of preference rows against the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from paft import data
from paft.delta import spans
from paft.errors import MismatchError, UsageError
from paft.evaluate import Evaluator, Held
from paft.merge.ops import Filter, keep
from paft.merge.trim import top
from paft.models import load_model, load_tokenizer
from paft.report.sources import Part, Source
from paft.report.sparsity import SparsityReport
from paft.report.verdict import percent

STATES = ("off", "on", "pruned", "half", "double")
IDLE = 0.01  # share of the loss below which a delta counts as doing nothing


@dataclass(frozen=True)
class Probe:
    """``losses`` by state; ``kept``: the share of all entries that the pruned delta has left."""

    data: str
    rows: int
    metric: str
    losses: dict[str, float]
    kept: float

    @property
    def gain(self) -> float:
        """How much the delta lowers the loss, in nats."""
        return self.losses["off"] - self.losses["on"]

    def share_of_gain(self, state: str) -> float | None:
        """(off - state) / (off - on); None where the delta gains or loses nothing."""
        return (self.losses["off"] - self.losses[state]) / self.gain if self.gain else None

    @property
    def sentence(self) -> str:
        told = f"{self.metric} on {self.data}: off {self.losses['off']:.3f}, on {self.losses['on']:.3f}"
        if abs(self.gain) < IDLE * abs(self.losses["off"]):
            return f"{told}: it does next to nothing there, so it is near zero for this task, not sparse."
        parts = {"pruned": f"the {percent(self.kept)} of entries that hold 90 % of the energy give", "half": "half of it gives",
                 "double": "twice it gives"}
        shares = [f"{what} {percent(self.share_of_gain(state) or 0.0)}" for state, what in parts.items()]
        return f"{told}; of that {'gain' if self.gain > 0 else 'loss'} {', '.join(shares)}."

    def to_dict(self) -> dict[str, Any]:
        shares = {state: self.share_of_gain(state) for state in STATES[2:]}
        return {**vars(self), "gain": self.gain, "share_of_gain": shares, "sentence": self.sentence}


def probe(source: Source, report: SparsityReport, base: str, held_out: str, *, rows: int | None = None, batch_size: int = 16,
          progress: Callable[[int, int, str], None] | None = None) -> Probe:
    """Measure ``source`` (opened over its base, ``report`` its sparsity) in one copy of the model in memory, in float32.

    Raises UsageError for data of neither kind, MismatchError where the model has no parameter for a tensor of the delta.
    """
    held = _held(held_out).head(rows)
    model = load_model(base)
    weights = _weights(model, source)
    first = (held.sft or held.pref)[0]
    scorer = Evaluator(load_tokenizer(base, chat=isinstance(first.get("prompt"), list)), held, None, batch_size=batch_size)
    metric = "sft_loss"
    if held.pref:
        scorer, metric = scorer.against(model), "dpo_loss"
    counts = [_count(tensor.moments.d90, part) for tensor, part in zip(report.tensors, source.parts, strict=True)]
    losses: dict[str, float] = {}
    for state, scale in zip(STATES, (0.0, 1.0, 1.0, 0.5, 2.0), strict=True):
        for part, weight, count in zip(source.parts, weights, counts, strict=True):
            _set(part, weight, scale, count if state == "pruned" else None)
        losses[state] = scorer(model)[metric]
        if progress:
            progress(len(losses), len(STATES), state)
    kept = sum(counts) / sum(part.entries for part in source.parts)
    return Probe(held_out, len(held.sft or held.pref), metric, losses, kept)


def _held(name: str) -> Held:
    try:
        return Held(data.load_rows(name, "sft"), [], [])
    except UsageError as error:
        try:
            return Held([], data.load_rows(name, "pref"), [])
        except UsageError:
            raise error from None


def _weights(model: torch.nn.Module, source: Source) -> list[torch.Tensor]:
    """The model's parameter of every part, as the matrix that the part changes."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for part in source.parts:
        name = part.weight[1] if part.weight else part.name
        if name not in named or named[name].numel() != part.entries:
            raise MismatchError(f"the running model has no parameter {name}", hint="merge the adapter and use paft eval")
        found.append(named[name].detach().view(part.rows, part.columns))
    return found


def _count(d90: Any, part: Part) -> int:
    return min(part.entries, math.ceil((d90.value + d90.bound) * part.entries)) if d90 else 0


def _set(part: Part, weight: torch.Tensor, scale: float, count: int | None) -> None:
    """``weight`` becomes W + scale·δ, of which only the ``count`` largest entries where a count is given."""
    assert part.weight is not None
    checkpoint, name = part.weight
    tensor = part.tiled()
    chosen: Filter = keep if count is None else top(tensor, max(1, count))
    for start, stop in spans(tensor):
        base = checkpoint.tile(name, start, stop).float()
        if scale:
            base += scale * chosen(tensor.tile(start, stop), start)
        weight[start:stop].copy_(base)
