"""The penalty of PAFT, ‖δ‖₁ on the product δ = s·B·A, and its control, ½‖δ‖².

    L = L_task + l1·Σ_ij |s·(B A)_ij| + l2·½·Σ_ij (s·(B A)_ij)²        (PAFT, arXiv 2406.17923, eq. 1; the l2 term is ours)

The sum runs over all entries of all adapted layers; A is r x n, B is m x r. The paper's λ means a sum, so it is not a mean
here either, and a λ does not carry over between models of different size. Value and subgradient

    ∂/∂B = |s|·sign(BA)·Aᵀ        ∂/∂A = |s|·Bᵀ·sign(BA)        with sign(0) = 0

come out of one pass over row tiles, in float32 (float64 for float64 factors): only factor-sized tensors are kept, where plain
autograd would keep every m x n product until the backward pass, a second copy of the model. ½‖δ‖² = ½s²·tr((AAᵀ)(BᵀB)) needs
no product at all. TRL and PEFT have no such term.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1 << 18  # entries of a product tile: 1 MB in float32, so that it stays in the L2 cache


class Factors(NamedTuple):
    """One adapted layer: δ = scale·B·A."""

    name: str
    A: Tensor
    B: Tensor
    scale: float


class _ProductL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        a, b = _accurate(A.detach()), _accurate(B.detach())
        with torch.autocast(a.device.type, enabled=False):
            total, grad_a, grad_b = _l1_and_gradients(a, b)
        ctx.save_for_backward(grad_a, grad_b)
        ctx.dtypes = A.dtype, B.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        grad_a, grad_b = ctx.saved_tensors
        return (grad * grad_a).to(ctx.dtypes[0]), (grad * grad_b).to(ctx.dtypes[1])


def _l1_and_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
    total = torch.zeros((), dtype=torch.float64 if a.device.type == "cpu" else a.dtype, device=a.device)
    for rows in _tiles(b.shape[0], a.shape[1]):
        tile = b[rows] @ a
        total += torch.linalg.vector_norm(tile, 1)
        sign = tile.sign_()
        grad_b[rows] = sign @ a.T
        grad_a.addmm_(b[rows].T, sign)
    return total.to(a.dtype), grad_a, grad_b


def product_l1(A: Tensor, B: Tensor) -> Tensor:
    """Σ|B·A| as a scalar, differentiable in A (r x n) and B (m x r), with memory of the size of the factors."""
    return _ProductL1.apply(A, B)


def product_half_square(A: Tensor, B: Tensor) -> Tensor:
    """½·Σ(B·A)² = ½·tr((A Aᵀ)(Bᵀ B)), differentiable; costs r x r Gram matrices only."""
    with torch.autocast(A.device.type, enabled=False):
        a, b = _accurate(A), _accurate(B)
        return 0.5 * ((a @ a.T) * (b.T @ b)).sum()


def lora_factors(model: torch.nn.Module, adapter: str = "default") -> Iterator[Factors]:
    """The live factors of an adapter's linear layers, in module order (PEFT's Linear and Conv1D wrappers)."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield Factors(name, module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter])  # type: ignore[arg-type]


def nonlinear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the layers whose LoRA is not ``s·B·A`` of a matrix (embeddings, convolutions): the penalty cannot see them."""
    from peft.tuners.lora import LoraLayer

    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)
            and not (module.lora_A and all(factor.weight.dim() == 2 for factor in module.lora_A.values()))]  # type: ignore[operator]


def penalty(model: torch.nn.Module, *, l1: float, l2: float, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """(l1·‖δ‖₁ + l2·½‖δ‖², ‖δ‖₁) over all layers; without ``scaled``, δ = B·A as the paper's Figure 2 measures it."""
    term, size = [], []
    for _, A, B, s in lora_factors(model):
        s = abs(s) if scaled else 1.0
        if l1:
            size.append(s * product_l1(A, B))
            term.append(l1 * size[-1])
        if l2:
            term.append(l2 * s**2 * product_half_square(A, B))
    norm = torch.stack([value.detach() for value in size]).sum() if size else torch.tensor(float("nan"))
    return torch.stack(term).sum(), norm


@torch.no_grad()
def share_below(model: torch.nn.Module, threshold: float = 1e-5, *, scaled: bool = True) -> float:
    """PAFT's sparsity while training: the share of all entries with |δ| < threshold (lr-dependent; see the report)."""
    below = entries = 0
    for _, A, B, s in lora_factors(model):
        bound = threshold / (abs(s) if scaled else 1.0)
        a, b = _accurate(A), _accurate(B)
        for rows in _tiles(b.shape[0], a.shape[1]):
            below += int(((b[rows] @ a).abs() < bound).sum())
        entries += b.shape[0] * a.shape[1]
    return below / max(entries, 1)


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, TILE // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _accurate(factor: Tensor) -> Tensor:
    return factor if factor.dtype == torch.float64 else factor.float()
