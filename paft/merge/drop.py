"""Dropping at random: a counter-based mask, so that every entry's fate depends on its key and index alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from paft.delta import Tiled
from paft.merge.ops import Dialect, Filter, flat_index, keep, total


@dataclass(frozen=True)
class Drop:
    """Keep each entry with probability ``density``, times ``scale``. Entry i is kept when hash(key + i·φ) <
    density·2³².

    The hash is SplitMix64's finaliser (Steele et al. 2014): a counter-based generator, so that the mask of an entry
    depends on its key and index alone.
    """

    key: int
    density: float
    scale: float = 1.0

    @property
    def limit(self) -> int:
        return round(self.density * (1 << 32))

    def mask(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        bits = flat_index(tile, start).mul_(GOLDEN).add_(self.key)
        bits ^= (bits >> 30) & ((1 << 34) - 1)  # int64 shifts copy the sign; the mask makes them logical
        bits *= MIX1
        bits ^= (bits >> 27) & ((1 << 37) - 1)
        bits *= MIX2
        bits ^= (bits >> 31) & ((1 << 33) - 1)
        return ((bits >> 32) & 0xFFFFFFFF) < self.limit

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        return tile * self.scale * self.mask(tile, start)


GOLDEN, MIX1, MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def drop(delta: Tiled, density: float, seed: int, rescale: bool, dialect: Dialect) -> Filter:
    """DARE's filter: drop entries at random, then restore the size by 1/density, or to the same L1 norm (mergekit)."""
    if density >= 1:
        return keep
    digest = hashlib.sha256(f"{seed}\0{delta.key}".encode()).digest()
    plain = Drop(int.from_bytes(digest[:8], "little", signed=True), density)
    if not rescale:
        return plain
    if not dialect.l1:
        return Drop(plain.key, density, 1 / density)
    before = total(delta, lambda tile, start: tile.abs())
    after = total(delta, lambda tile, start: tile.abs() * plain.mask(tile, start))
    return Drop(plain.key, density, before / after if after else 1.0)
