"""An adapter laid on a base: for each tensor of the base, the parts of the adapter that change it (see `variants`).

Everything in the adapter has its place or is refused by name; PEFT would load what fits and only warn of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from paft.adapter import Adapter
from paft.checkpoint import Checkpoint, Entry
from paft.errors import MismatchError
from paft.factors import Factors, Rows, Saved
from paft.naming import Names, is_vocabulary
from paft.peftfile import HEADS
from paft.tying import untangle
from paft.variants import LowRank, Part, Shift, Stack

# Model types of transformers whose linear layers are Conv1D and store W as [in, out].
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_RESIZED = "its vocabulary was resized; resize the base's first (model.resize_token_embeddings)"


@dataclass(frozen=True)
class Placement:
    """``parts`` by the base's tensors; ``modules`` names the module of those that are one plain s·B·A.

    ``twins`` maps the second copy of a tied tensor to the first, whose random mask it shares. ``adapter`` lacks the
    saved tensors that equal the base's own, since they change nothing.
    """

    adapter: Adapter
    parts: dict[str, list[Part]]
    modules: dict[str, str]
    twins: dict[str, str]


def place(adapter: Adapter, base: Checkpoint) -> Placement:
    """Find the place of everything in ``adapter``.

    Raises MismatchError, with the tensor's name, for what the base does not have, has in another shape or quantised, for
    two changes of one tensor that do not add up, for a change of one of two tied tensors, and for a module of
    ``modules_to_save`` that the base has and the adapter's file lacks.
    """
    _check_saved(adapter, base)
    placer = _Placer(adapter, base)
    saved = placer.place()
    parts, sources = placer.parts, placer.sources
    twins = untangle(parts, placer.names)
    if not parts:
        raise MismatchError(f"{adapter.name} is empty: nothing in it changes the base", hint="leave it out")
    modules = {
        name: sources[name][0]
        for name, found in parts.items()
        if name not in twins and len(found) == 1 and _is_plain(found[0]) and sources[name][0] in adapter.factors
    }
    return Placement(replace(adapter, saved=saved), parts, modules, twins)


def _check_saved(adapter: Adapter, base: Checkpoint) -> None:
    """PEFT would take a module that it should have saved from the base, with a warning."""
    for module in adapter.config.get("modules_to_save") or []:
        wanted = next((name for name in base.entries if f".{module}." in f".{name}"), None)
        if wanted and not any(f".{module}." in f".{name}" for name in adapter.saved):
            raise MismatchError(f"{adapter.name} lacks {wanted}, which its modules_to_save promise",
                                hint="the file is incomplete: save the adapter again")


def _is_plain(part: Part) -> bool:
    return isinstance(part, LowRank) and part.factors.magnitude is None


class _Placer:
    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self.adapter, self.base = adapter, base
        self.names = Names(base, adapter.name, adapter.base_model)
        self.parts: dict[str, list[Part]] = {}
        self.sources: dict[str, list[str]] = {}  # what the adapter calls each part

    def place(self) -> dict[str, Saved]:
        """Fill ``parts`` and ``sources``; returns the saved tensors that differ from the base's."""
        adapter = self.adapter
        stacked = {expert for experts in adapter.stacks.values() for expert in experts}
        for module, factors in adapter.factors.items():
            if module not in stacked:
                self._place_factors(module, factors)
        for parameter, experts in adapter.stacks.items():
            self._place_stack(parameter, [adapter.factors[expert] for expert in experts])
        for module, bias in adapter.biases.items():
            name = self.names.find(f"{module}.bias", "lora_bias needs layers that have a bias; PEFT cannot merge it either")
            self._check_shape(name, f"{module}.bias", bias.shape)
            self._add(name, module, Shift(bias))
        for module, rows in adapter.rows.items():
            self._place_rows(module, rows)
        return {name: saved for name, saved in adapter.saved.items() if self._place_saved(name, saved)}

    def _add(self, name: str, source: str, part: Part) -> None:
        """Two changes of a tensor add up only when one replaces it and the other is a product or a shift."""
        for before, other in zip(self.parts.get(name, []), self.sources.get(name, []), strict=True):
            adds_up = isinstance(part, Saved) and (_is_plain(before) or isinstance(before, Shift | Stack))
            if not adds_up:
                raise MismatchError(f"{self.adapter.name}: {source} and {other} are both {name} of the base, and do not add up")
        self.parts.setdefault(name, []).append(part)
        self.sources.setdefault(name, []).append(source)

    def _place_factors(self, module: str, factors: Factors) -> None:
        name = self.names.find(f"{module}.weight")
        transposed = self._is_transposed(module, factors)
        shape = factors.shape
        self._check_shape(name, f"{module}.weight", shape[::-1] if transposed else shape)
        self._add(name, module, LowRank(factors, transposed))

    def _is_transposed(self, module: str, factors: Factors) -> bool:
        """Is W stored as [in, out]? The base decides, as PEFT corrects the flag by the layer's class."""
        kind = self.base.config.get("model_type")
        if factors.embedding:
            return False
        return kind in CONV1D_MODELS and module.rpartition(".")[2] not in HEADS if kind else factors.fan_in_fan_out

    def _place_saved(self, name: str, saved: Saved) -> bool:
        """Place a tensor that is replaced, unless it is the base's own (in the type in which it was saved)."""
        target = self.names.find(name, "modules_to_save brings a module that the base lacks; it cannot be merged into it")
        self._check_shape(target, name, saved.entry.shape, floats=saved.entry.is_float)
        if self._is_own(target, saved.entry):
            return False
        if not saved.declared:
            raise MismatchError(
                f"{self.adapter.name} replaces {name}, but its configuration does not say so",
                hint="name it in modules_to_save, or set bias, in adapter_config.json",
            )
        if not saved.entry.is_float:
            raise MismatchError(f"{self.adapter.name} replaces {name} ({saved.entry.dtype}), which cannot be merged")
        self._add(target, name, saved)
        return True

    def _is_own(self, target: str, entry: Entry) -> bool:
        own = self.names.stored_as(target) or target
        source = Checkpoint(self.adapter.path, (entry.file,), {own: entry}, {})
        if not entry.is_float:
            return self.base.entries[own].dtype == entry.dtype and source.raw(own) == self.base.raw(own)
        step = max(1, (1 << 20) // max(1, entry.columns))
        for start in range(0, entry.rows, step):
            tile = source.tile(own, start, min(start + step, entry.rows))
            if not torch.equal(self.base.tile(own, start, start + len(tile)).to(tile.dtype), tile):
                return False
        return True

    def _place_rows(self, module: str, rows: Rows) -> None:
        name = self.names.find(f"{module}.weight")
        height = self.base.entries[self.names.stored_as(name) or name].shape[0]
        self._check_shape(name, f"{module}.weight", (height, rows.values.shape[1]))
        if not all(isinstance(row, int) and 0 <= row < height for row in rows.indices):
            worst = next(row for row in rows.indices if not (isinstance(row, int) and 0 <= row < height))
            raise MismatchError(f"{self.adapter.name} replaces row {worst} of {name}, which has {height} rows", hint=_RESIZED)
        self._add(name, module, rows)

    def _place_stack(self, parameter: str, experts: Sequence[Factors]) -> None:
        """A parameter that the loaded model stacks: each expert where the file keeps it, or the whole stack."""
        stored = self.names.stored.get(parameter)
        if stored is None or not stored.operations:
            self._place_whole(parameter, experts)
            return
        files: dict[int, list[str]] = {}
        for piece in stored.pieces:
            files.setdefault(piece.place, []).append(piece.name)
        joined = dict(stored.operations)
        known = joined in ({"MergeModulelist": 0}, {"MergeModulelist": 0, "Concatenate": 1})
        if not known or any(len(names) != len(experts) for names in files.values()):
            raise MismatchError(f"{self.adapter.name}: the base stores {parameter} in another layout ({', '.join(joined)})")
        for index, factors in enumerate(experts):
            heights = [self.base.entries[files[place][index]].shape[0] for place in sorted(files)]
            if sum(heights) != len(factors.B):
                raise MismatchError(f"{self.adapter.name}: {parameter} has {len(factors.B)} outputs, the base's {sum(heights)}")
            for place, rows in zip(sorted(files), factors.B.split(heights), strict=True):
                name, part = files[place][index], replace(factors, b=rows)
                self._check_shape(name, parameter, (len(rows), part.A.shape[1]))
                self._add(name, f"{parameter}[{index}]", LowRank(part, False))

    def _place_whole(self, parameter: str, experts: Sequence[Factors]) -> None:
        name = self.names.find(parameter)
        shape = self.base.entries[name].shape
        rows, columns = len(experts[0].B), experts[0].A.shape[1]
        straight, turned = (len(experts), rows, columns), (len(experts), columns, rows)
        if shape == straight == turned:
            raise MismatchError(f"{self.adapter.name}: the experts of {name} are square, so their layout cannot be told")
        if len(experts) == 1 and len(shape) == 2:
            straight = (rows, columns)
        self._check_shape(name, parameter, turned if shape == turned else straight)
        self._add(name, parameter, Stack(tuple(LowRank(each, shape == turned) for each in experts)))

    def _check_shape(self, name: str, source: str, shape: Sequence[int], *, floats: bool = True) -> None:
        entry = self.base.entries[self.names.stored_as(name) or name]
        if floats and not entry.is_float:
            raise MismatchError(f"the base's {name} is quantised ({entry.dtype})", hint="merge into the float base")
        if entry.shape != tuple(shape):
            resized = is_vocabulary(source) and len(shape) == 2 and entry.shape[1:] == tuple(shape[1:])
            raise MismatchError(
                f"{self.adapter.name}: ΔW of {name} is {list(shape)}, the base's is {list(entry.shape)}",
                hint=_RESIZED if resized else f"the adapter was trained on {self.adapter.base_model or 'another model'}",
            )
