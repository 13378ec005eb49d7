"""Dropping at random: a counter-based mask, so that every entry's fate depends on its key and index alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from paft.delta import Tiled
from paft.errors import UsageError
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
        return random_bits(self.key, tile, start) < self.limit

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        return tile * self.scale * self.mask(tile, start)


@dataclass(frozen=True)
class RankedDrop:
    """Keep an entry the likelier, the larger it is within its row; equal magnitudes rank in index order.

        p = density - ε + 2ε·(rank - 1) / (columns - 1),   rank 1 the smallest;  p = density in a row of one entry

    ``inverse`` divides a kept entry by its own p. Entry i is kept when its hash, as in `Drop`, is below p·2³².
    """

    key: int
    density: float
    epsilon: float
    inverse: bool = False
    scale: float = 1.0

    def mask(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        bounds = (self._chances(tile.shape[1]) * (1 << 32)).round().long()
        return random_bits(self.key, tile, start) < bounds[_ranks(tile)]

    def __call__(self, tile: torch.Tensor, start: int) -> torch.Tensor:
        kept = tile * self.scale * self.mask(tile, start)
        return kept / self._chances(tile.shape[1]).to(tile.dtype)[_ranks(tile)] if self.inverse else kept

    def _chances(self, columns: int) -> torch.Tensor:
        """p by rank, from the smallest."""
        if columns == 1:
            return torch.tensor([self.density], dtype=torch.float64)
        rise = torch.arange(columns, dtype=torch.float64) / (columns - 1)
        return self.density - self.epsilon + 2 * self.epsilon * rise


def random_bits(key: int, tile: torch.Tensor, start: int) -> torch.Tensor:
    """32 random bits for each entry of a tile that begins at row ``start``, as int64."""
    bits = flat_index(tile, start).mul_(GOLDEN).add_(key)
    bits ^= (bits >> 30) & ((1 << 34) - 1)  # int64 shifts copy the sign; the mask makes them logical
    bits *= MIX1
    bits ^= (bits >> 27) & ((1 << 37) - 1)
    bits *= MIX2
    bits ^= (bits >> 31) & ((1 << 33) - 1)
    return (bits >> 32) & 0xFFFFFFFF


GOLDEN, MIX1, MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_Rule = TypeVar("_Rule", Drop, RankedDrop)


def drop(delta: Tiled, density: float, seed: int, rescale: bool, dialect: Dialect) -> Filter:
    """DARE's filter: drop entries at random, then restore the size by 1/density, or to the same L1 norm (mergekit)."""
    if density >= 1:
        return keep
    plain = Drop(_key(delta, seed), density)
    if not rescale:
        return plain
    return _restored(delta, plain) if dialect.l1 else replace(plain, scale=1 / density)


def ranked_drop(delta: Tiled, density: float, epsilon: float, seed: int, rescale: bool, dialect: Dialect) -> Filter:
    """DELLA's filter: drop small entries more often, then restore the size by 1/p, or to the same L1 norm (mergekit).

    Raises UsageError when density ± epsilon leaves (0, 1), unless everything is kept.
    """
    if density >= 1:
        return keep
    if not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
        room = min(density, 1 - density)
        raise UsageError(f"density ± epsilon must stay within (0, 1), not {density} ± {epsilon}", hint=f"epsilon below {room:g}")
    plain = RankedDrop(_key(delta, seed), density, epsilon)
    if not rescale:
        return plain
    return _restored(delta, plain) if dialect.l1 else replace(plain, inverse=True)


def _key(delta: Tiled, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{delta.key}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _restored(delta: Tiled, rule: _Rule) -> _Rule:
    before = total(delta, lambda tile, start: tile.abs())
    after = total(delta, lambda tile, start: tile.abs() * rule.mask(tile, start))
    return replace(rule, scale=before / after if after else 1.0)


def _ranks(tile: torch.Tensor) -> torch.Tensor:
    """Each entry's place in its row by magnitude, 0 the smallest."""
    order = tile.abs().argsort(dim=1, stable=True)
    places = torch.arange(tile.shape[1]).expand(order.shape)
    return torch.empty_like(order).scatter_(1, order, places)
