"""The penalty of PAFT, ‖δ‖₁ on the product δ = s·B·A, and its control, ½‖δ‖².

    L = L_task + l1·Σ_ij |s·(B A)_ij| + l2·½·Σ_ij (s·(B A)_ij)²        (PAFT, arXiv 2406.17923, eq. 1; the l2 term is ours)

The sum runs over all entries of all adapted layers; A is r x n, B is m x r. The paper's λ means a sum, so it is not a mean
here either, and a λ does not carry over between models of different size. Value and subgradient

    ∂/∂B = |s|·sign(BA)·Aᵀ        ∂/∂A = |s|·Bᵀ·sign(BA)        with sign(0) = 0

are computed in row tiles, in float32 (float64 for float64 factors), the value in the forward pass and the gradient in the
backward pass from the factors alone: nothing is kept between the two but references to A and B, where plain autograd keeps every
m x n product, a second copy of the model. ½‖δ‖² = ½s²·tr((AAᵀ)(BᵀB)) needs no product at all. TRL and PEFT have no such term.

With DoRA, W' = m·(W + sBA)/‖W + sBA‖, the product s·B·A is penalised and counted, not W' - W: the magnitudes m are not in it,
and where one of them moves, a whole row of W' - W is dense. An embedding's δ is (s·B·A)ᵀ, which has the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1 << 18  # entries of a product tile on the CPU: 1 MB in float32, so that it stays in the L2 cache
WIDE = 1 << 22  # elsewhere, where starting a kernel costs more than memory traffic: 16 MB


class Factors(NamedTuple):
    """One adapted layer: δ = scale·B·A. Under FSDP2, A and B are DTensors; `whole` gathers them."""

    name: str
    A: Tensor
    B: Tensor
    scale: float


class _ProductL1(torch.autograd.Function):
    """Of k layers of one shape: A_1 ... A_k (r x n), B_1 ... B_k (m x r) -> the k sums."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        a, b = _stacked(factors)
        totals = torch.zeros(len(a), dtype=torch.float64 if a.device.type == "cpu" else a.dtype, device=a.device)
        with torch.autocast(a.device.type, enabled=False):
            for rows in tiles(b.shape[1], a[:, 0].numel(), a.device):
                totals += (b[:, rows] @ a).abs_().sum((1, 2))  # six times as fast as vector_norm
        return totals.to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a, b = _stacked(ctx.saved_tensors)
        grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
        for rows in tiles(b.shape[1], a[:, 0].numel(), a.device):
            left = b[:, rows]
            sign = (left @ a).sign_()
            grad_b[:, rows] = sign @ a.mT
            grad_a.baddbmm_(left.mT, sign)
        types = [factor.dtype for factor in ctx.saved_tensors]
        grads = [*(grad[:, None, None] * grad_a), *(grad[:, None, None] * grad_b)]
        return tuple(each.to(dtype) for each, dtype in zip(grads, types, strict=True))


def _stacked(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    half = len(factors) // 2
    if half == 1:
        return accurate(factors[0].detach())[None], accurate(factors[1].detach())[None]
    return accurate(torch.stack(factors[:half])), accurate(torch.stack(factors[half:]))


def product_l1(A: Tensor, B: Tensor) -> Tensor:
    """Σ|B·A| as a scalar, differentiable in A (r x n) and B (m x r); keeps nothing but the two."""
    return _ProductL1.apply(A, B)[0]


def product_half_square(A: Tensor, B: Tensor) -> Tensor:
    """½·Σ(B·A)² = ½·tr((A Aᵀ)(Bᵀ B)), differentiable; costs r x r Gram matrices only."""
    with torch.autocast(A.device.type, enabled=False):
        a, b = accurate(A), accurate(B)
        return 0.5 * ((a @ a.T) * (b.T @ b)).sum()


def lora_factors(model: torch.nn.Module, adapter: str | None = None) -> Iterator[Factors]:
    """The live factors of an adapter, in module order: linear layers, Conv1D and embeddings.

    ``adapter`` None means what is being trained: the active adapters whose factors take gradients. A reference or a frozen
    adapter on the same model does not count; two that train at once count one by one, not as their sum.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for each in module.active_adapters if adapter is None else [adapter]:
            if (pair := _pair(module, each)) and (adapter or any(factor.requires_grad for factor in pair)):
                yield Factors(name, *pair, module.scaling[each])


def _pair(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


def nonlinear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the layers whose LoRA is not ``s·B·A`` of one matrix (convolutions, stacked experts): nothing sees them."""
    from peft.tuners.lora import LoraLayer

    def is_product(layer: Any) -> bool:
        pairs = [_pair(layer, adapter) for adapter in layer.scaling]
        one = getattr(layer, "num_experts", 1) == 1
        return one and bool(pairs) and all(pair is not None and pair[0].dim() == pair[1].dim() == 2 for pair in pairs)

    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer) and not is_product(module)]


def penalty(model: torch.nn.Module, *, l1: float, l2: float, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """(l1·‖δ‖₁ + l2·½‖δ‖², ‖δ‖₁) over all layers; without ``scaled``, δ = B·A as the paper's Figure 2 measures it.

    Small layers of one shape are taken together, up to a tile: on a GPU the number of kernels, not the arithmetic, is the cost.
    """
    term, size = [], []
    for group in _alike(model, scaled):
        A, B = [a for a, *_ in group], [b for _, b, _ in group]
        if l1:
            scales = A[0].new_tensor([s for *_, s in group], dtype=accurate(A[0]).dtype)
            size.append((_ProductL1.apply(*A, *B) * scales).sum())
            term.append(l1 * size[-1])
        if l2:
            term += [l2 * s**2 * product_half_square(a, b) for a, b, s in group]
    norm = torch.stack([value.detach() for value in size]).sum() if size else torch.tensor(float("nan"))
    return torch.stack(term).sum(), norm


def _alike(model: torch.nn.Module, scaled: bool) -> list[list[tuple[Tensor, Tensor, float]]]:
    """Whole factors and |s| of layers that have one shape, type and device, as many as fill a tile."""
    groups: list[list[tuple[Tensor, Tensor, float]]] = []
    open_ones: dict[Any, list[tuple[Tensor, Tensor, float]]] = {}
    for _, A, B, s in lora_factors(model):
        key = (A.shape, B.shape, A.dtype, B.dtype, A.device)
        group = open_ones.get(key)
        if group is None or (len(group) + 1) * A.shape[1] * B.shape[0] > _budget(A.device):
            groups.append(group := [])
            open_ones[key] = group
        group.append((whole(A), whole(B), abs(s) if scaled else 1.0))
    return groups


def tiles(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Row ranges of a product with at most so many entries each as suit the device."""
    step = max(1, _budget(device) // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _budget(device: torch.device) -> int:
    return TILE if device.type == "cpu" else WIDE


def accurate(factor: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return factor if factor.dtype == torch.float64 else factor.float()


def whole(factor: Tensor) -> Tensor:
    """All rows of a factor that FSDP2 shards (an all-gather; its gradient is sharded again), any other as it is."""
    return factor.full_tensor() if is_sharded(factor) else factor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Is it a part of a tensor that FSDP2 holds in several processes?"""
    return hasattr(tensor, "full_tensor")
