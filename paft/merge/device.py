"""A merge on another device: its deltas there, and new tensors made there, by the same code.

The masks of DARE are integers and the same bits; sums and products are the device's own, so weights agree with the CPU's to
float32 rounding before they are rounded to the output type.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from paft.delta import ProductTensor, Tiled
from paft.errors import ResourceError

DEVICES = ("cpu", "cuda")


def check_device(device: str) -> None:
    """Raises ResourceError for a device that this machine, or this build of torch, does not have."""
    if device == "cuda" and not torch.cuda.is_available():
        build = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise ResourceError(f"there is no CUDA device here: {build}", hint="leave out --device; the CPU gives the same result")


def making(device: str) -> AbstractContextManager:
    """Within it, tensors are made on the device; only in this thread."""
    return nullcontext() if device == "cpu" else torch.device(device)


def moved(tensor: Tiled, device: str) -> Tiled:
    """The delta on the device: a product's factors once, anything else tile by tile."""
    if device == "cpu":
        return tensor
    if isinstance(tensor, ProductTensor):
        return replace(tensor, left=tensor.left.to(device), right=tensor.right.to(device))
    return _Moved(tensor, device)


@dataclass(frozen=True)
class _Moved:
    tensor: Tiled
    device: str

    @property
    def rows(self) -> int:
        return self.tensor.rows

    @property
    def columns(self) -> int:
        return self.tensor.columns

    @property
    def step(self) -> int:
        return self.tensor.step

    @property
    def key(self) -> str:
        return self.tensor.key

    def tile(self, start: int, stop: int) -> torch.Tensor:
        with torch.device("cpu"):
            tile = self.tensor.tile(start, stop)
        return tile.to(self.device)
