"""Low-rank factors of a delta with their error, from its factors or from its row tiles; D is never held.

    D ≈ L R,   L: [rows, r],  R: [r, columns],   relative error ‖D - L R‖_F / ‖D‖_F

A sum of products is cut exactly: QR of both sides, SVD of the small core. Any other D goes through a randomised range
finder (Halko, Martinsson & Tropp, SIAM Review 2011, algorithms 4.4 and 5.1) that sees row tiles only:

    V ← orth(random [columns, r + 16])
    twice: V ← orth(Σ_tiles D_tᵀ (D_t V)) = orth(DᵀD V)     one pass each; the first also sums ‖D‖²
    Y = D V;  Y = U S Wᵀ;  L = U √S,  R = √S (V W)ᵀ          one pass

so three passes over D, and a sketch of (rows + columns) x (r + 16) float64 numbers in memory. A requested error doubles
the sketch until it is reached, three passes each time. D - L R is orthogonal to L R, so its square is ‖D‖² - Σ s_i²,
exactly: the error is measured, not estimated. In float64 that holds to 1e-8 of ‖D‖.

PEFT's ``svd`` combinations build D and its full SVD; mergekit-extract-lora reads two whole models and reports no error.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from paft.delta import TILE_ELEMENTS, Tiled, tile_rows
from paft.errors import MismatchError, UsageError
from paft.merge.merged import factors

OVERSAMPLING = 16
POWER = 2  # passes that turn the sketch towards the leading directions
START = 16  # the first rank that is tried for a requested error
MIN_ERROR = 1e-6  # below it, float32 factors themselves do not hold


@dataclass(frozen=True)
class Budget:
    """Where to cut: at ``rank``, or at the smallest rank whose relative error is at most ``error``.

    Raises UsageError for a rank below 1, an error outside [1e-6, 1), or unless exactly one of the two is given.
    """

    rank: int | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.error is None):
            raise UsageError("give a rank or a largest error, one of the two", hint="--rank 16, or --max-error 0.05")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(f"rank must be a whole number above 0, not {self.rank!r}", hint="for example --rank 16")
        if self.error is not None and not MIN_ERROR <= self.error < 1:
            raise UsageError(
                f"the largest error must be in [{MIN_ERROR:g}, 1), not {self.error!r}",
                hint="it is relative to the delta's norm: --max-error 0.05",
            )

    def named(self) -> dict[str, int | float]:
        """What was asked for, under the name of its option, for records."""
        return {"rank": self.rank} if self.rank is not None else {"max_error": self.error or 0.0}

    def cut(self, energy: float, squares: list[float]) -> int | None:
        """How many of the leading directions to keep, or None where these do not reach the requested error."""
        if self.rank is not None:
            return min(self.rank, len(squares))
        assert self.error is not None
        reached = itertools.accumulate(squares)
        enough = energy * (1 - self.error**2)
        return next((count for count, square in enumerate(reached, start=1) if square >= enough), None)


@dataclass(frozen=True)
class LowRank:
    """``left @ right`` in float64, the norm of D, and the norm of what is missing."""

    left: torch.Tensor
    right: torch.Tensor
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def low_rank(name: str, tensor: Tiled, budget: Budget | None, seed: int = 0) -> LowRank | None:
    """Factors of a delta within the budget, None where the delta is zero; without a budget it must be a sum of products.

    ``name`` and ``seed`` draw the sketch. The tiles that are read, and so the result, do not depend on the tensor's own
    tile size. Raises UsageError where a budget is needed, MismatchError for a delta with NaN or infinity.
    """
    product = factors(tensor)
    if product is not None:
        return _cut(*product, budget)
    if budget is None:
        raise UsageError(f"the delta of {name} is not of low rank", hint="give --rank N or --max-error E")
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    found = _sketch(tensor, budget, torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))
    if found is not None and not math.isfinite(found.norm):
        raise MismatchError(f"the delta of {name} holds NaN or infinity")
    return found


def product_energy(left: torch.Tensor, right: torch.Tensor) -> float:
    """‖left @ right‖² from the r x r Gram matrices."""
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def _cut(left: torch.Tensor, right: torch.Tensor, budget: Budget | None) -> LowRank | None:
    norm = math.sqrt(product_energy(left, right))
    if norm == 0:
        return None
    if budget is None or (budget.rank is not None and budget.rank >= left.shape[1]):
        return LowRank(left, right, norm, 0.0)
    (tall, upper), (wide, lower) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, vt = torch.linalg.svd(upper @ lower.T)
    squares = values.square().tolist()
    count = budget.cut(math.fsum(squares), squares)
    assert count is not None, "all directions of a product leave nothing"
    root = values[:count].sqrt()
    lost = math.sqrt(math.fsum(squares[count:]))
    return LowRank(tall @ (u[:, :count] * root), (root[:, None] * vt[:count]) @ wide.T, norm, lost)


def _sketch(tensor: Tiled, budget: Budget, generator: torch.Generator) -> LowRank | None:
    full = min(tensor.rows, tensor.columns)
    width = min(full, (budget.rank or START) + OVERSAMPLING)
    basis, energy = torch.empty(tensor.columns, 0, dtype=torch.float64), 0.0
    while True:
        fresh = torch.randn(tensor.columns, width - basis.shape[1], generator=generator, dtype=torch.float64)
        basis = _orthonormal(torch.cat([basis, fresh], dim=1))
        for _ in range(POWER):
            turned, energy = _gram_times(tensor, basis)
            if energy == 0:
                return None
            if not math.isfinite(energy):
                return LowRank(basis[:0], basis[:0].T, energy, energy)
            basis = _orthonormal(turned)
        image = torch.cat([tile @ basis for tile in _tiles(tensor)])
        u, values, vt = torch.linalg.svd(image, full_matrices=False)
        squares = values.square().tolist()
        count = budget.cut(energy, squares)
        if count is None and width == full:
            count = full
        if count is not None:
            root = values[:count].sqrt()
            right = (root[:, None] * vt[:count]) @ basis.T
            return LowRank(u[:, :count] * root, right, math.sqrt(energy), _residual(energy, squares[:count]))
        width = min(full, 2 * width)


def _gram_times(tensor: Tiled, basis: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(DᵀD @ basis, ‖D‖²) in one pass."""
    out, rows = torch.zeros_like(basis), []
    for tile in _tiles(tensor):
        out += tile.T @ (tile @ basis)
        rows += tile.square().sum(dim=1).tolist()
    return out, math.fsum(rows)


def _tiles(tensor: Tiled) -> Iterator[torch.Tensor]:
    """Tiles in float64, of a height that follows from the shape alone: another height would round the products anew."""
    step = tile_rows(tensor.columns, TILE_ELEMENTS)
    for start in range(0, tensor.rows, step):
        yield tensor.tile(start, min(start + step, tensor.rows)).double()


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix).Q


def _residual(energy: float, squares: list[float]) -> float:
    return math.sqrt(max(0.0, math.fsum([energy, *(-square for square in squares)])))
