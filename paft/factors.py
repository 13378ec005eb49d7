"""What an adapter holds, module by module: its factors, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from paft.checkpoint import Entry


@dataclass(frozen=True)
class Stored:
    """A factor on the disk: what reads it, and the shape that it has there."""

    read: Callable[[], torch.Tensor]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Factors:
    """One module's ``ΔW = scale · B @ A``, float32; ``fan_in_fan_out`` is the configuration's claim about the base.

    Of an ``embedding`` the product is the tensor as it is stored, [vocabulary, hidden]. With a ``magnitude`` (DoRA)
    the product is not all of ΔW: it turns the direction of W's columns, and ``magnitude`` sets their length.
    A factor may be `Stored`: it then stays on the disk, and each use of ``A`` or ``B`` reads it.
    """

    a: torch.Tensor | Stored
    b: torch.Tensor | Stored
    scale: float
    fan_in_fan_out: bool
    embedding: bool = False
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product, ``[out, in]``; nothing is read for it."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def A(self) -> torch.Tensor:
        return self.a if isinstance(self.a, torch.Tensor) else self.a.read()

    @property
    def B(self) -> torch.Tensor:
        return self.b if isinstance(self.b, torch.Tensor) else self.b.read()


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding: row ``indices[i]`` becomes ``values[i]``, float32."""

    indices: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class Saved:
    """A tensor of the base that the adapter replaces; ``declared`` if its configuration says so."""

    entry: Entry
    declared: bool


@dataclass(frozen=True)
class Parts:
    """Everything in an adapter's file. ``stacks``: parameter -> the names of its experts in ``factors``, in order."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    saved: Mapping[str, Saved] = field(default_factory=dict)
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
