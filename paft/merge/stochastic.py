"""Stochastic rounding: up or down with the probability that keeps the mean, so that small deltas survive on average."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from paft.merge.drop import random_bits


@dataclass(frozen=True)
class Rounding:
    """``value`` in a 16-bit float type, at the neighbour that random bits choose.

        lo <= v <= hi neighbours in the type,   P(hi) = (v - lo) / (hi - lo),   so E[out] = v

    Deltas far below a unit in the last place of W vanish under rounding to nearest; here each of them moves its weight by
    a whole unit, as rarely as it is small. The bits are those of `drop.random_bits`, keyed by seed and tensor name: no tile
    size, thread or device changes them. What the type holds exactly stays, and float32 and float64 are rounded as ever.
    """

    seed: int
    name: str

    @property
    def key(self) -> int:
        digest = hashlib.sha256(f"{self.seed}\0rounding\0{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def __call__(self, value: torch.Tensor, dtype: torch.dtype, start: int) -> torch.Tensor:
        near = value.to(dtype)
        if dtype.itemsize != 2:
            return near
        back = near.to(value.dtype)
        miss = value - back
        other = _next(near, miss)
        gap = (other.to(value.dtype) - back).abs().double()
        moves = random_bits(self.key, value, start) < (miss.abs().double() / gap * (1 << 32)).nan_to_num(0.0)
        return torch.where(moves & (miss != 0), other, near)


def _next(near: torch.Tensor, miss: torch.Tensor) -> torch.Tensor:
    """The neighbour on the side of ``miss``: a sign bit and a magnitude that counts through the type's values."""
    bits = near.view(torch.int16).int() & 0xFFFF
    away = (miss > 0) == (near > 0)
    stepped = torch.where(away, bits + 1, bits - 1)
    smallest = torch.where(miss < 0, 0x8001, 1)
    return torch.where(near == 0, smallest, stepped).to(torch.int16).view(near.dtype)
