"""One tensor's merged delta as a `Tiled` again, so that whatever reads a delta by tiles can read a merged one.

    D = plan(ΔW_1, ..., ΔW_n)

Where the plan is linear and every ΔW_i is a product, D is a sum of products: `terms` lists them as they are added (the
same bits when added again), `factors` gives them as one product (the same matrix, another order of rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paft.delta import ProductTensor, Tiled, ZeroTensor, fill
from paft.merge.ops import Plan
from paft.merge.select import FUSED_FROM

# A product by its place in a list, or a weighted sum of terms as [[coefficient, term], ...]; [] is zero.
Term = int | list


@dataclass(frozen=True)
class Merged:
    """``plan(tensors)`` by rows; every read runs the method's filters and combination again, nothing is kept."""

    tensors: Sequence[Tiled]
    plan: Plan
    key: str = ""

    @property
    def rows(self) -> int:
        return self.tensors[0].rows

    @property
    def columns(self) -> int:
        return self.tensors[0].columns

    @property
    def step(self) -> int:
        return self.tensors[0].step

    def tile(self, start: int, stop: int) -> torch.Tensor:
        fused = self._fused()
        if fused is None:
            return self.plan([tensor.tile(start, stop) for tensor in self.tensors], start)
        stack = torch.empty(len(self.tensors) + 1, stop - start, self.columns)
        for place, tensor in zip(stack[:-1], self.tensors, strict=True):
            fill(place, tensor, start, stop)
        fused.combine(stack[:-1].numpy(), start, stack[-1].numpy())
        return stack[-1]

    def _fused(self) -> Any:
        """`kernels.Fused`, which gives the same bits faster, where it pays and where there is one."""
        if self.rows * self.columns < FUSED_FROM or self.tensors[0].tile(0, 1).dtype != torch.float32:
            return None
        from paft.merge.kernels import fuse

        return fuse(self.plan)


def terms(tensor: Tiled, products: list[ProductTensor]) -> Term | None:
    """The sum that a tensor is, its products appended to ``products``; None where it is no sum of products.

    Zeros are left out, which changes no bit but the sign of a zero.
    """
    if isinstance(tensor, ProductTensor):
        products.append(tensor)
        return len(products) - 1
    if isinstance(tensor, ZeroTensor):
        return []
    if not isinstance(tensor, Merged) or tensor.plan.coefficients is None:
        return None
    found: list[list] = []
    for coefficient, part in zip(tensor.plan.coefficients, tensor.tensors, strict=True):
        term = terms(part, products)
        if term is None:
            return None
        if term != []:
            found.append([float(coefficient), term])
    return found


def products(tensors: Sequence[Tiled]) -> list[ProductTensor] | None:
    """All products of tensors that are products or sums of them; None where one is not."""
    found: list[ProductTensor] = []
    return found if all(terms(tensor, found) is not None for tensor in tensors) else None


def factors(tensor: Tiled) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(left, right)`` in float64 with ``D = left @ right``, [rows, R] and [R, columns]; None where D is no such sum."""
    products: list[ProductTensor] = []
    term = terms(tensor, products)
    if term is None:
        return None
    shares = [0.0] * len(products)
    _collect(term, 1.0, shares)
    lefts = [product.left.double() * share for product, share in zip(products, shares, strict=True)]
    rights = [product.right.double() for product in products]
    empty = torch.empty(tensor.rows, 0, dtype=torch.float64), torch.empty(0, tensor.columns, dtype=torch.float64)
    return torch.cat([empty[0], *lefts], dim=1), torch.cat([empty[1], *rights])


def _collect(term: Term, share: float, shares: list[float]) -> None:
    if isinstance(term, int):
        shares[term] += share
        return
    for coefficient, inner in term:
        _collect(inner, share * coefficient, shares)
