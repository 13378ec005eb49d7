"""The proximal step: exact zeros in rows of B and columns of A, after each step of the optimiser.

A low-rank product is zero where a row of B or a column of A is, and hardly anywhere else. Over the directions of r-vectors
|⟨u, v⟩| is c_r·‖u‖·‖v‖ on average, with c_r = Γ(r/2)/(√π·Γ((r+1)/2)) (1 at r = 1, near √(2/πr) later), so

    λ·Σ_ij |s·⟨B_i, A_j⟩|   ≈   P(A, B) = λ·|s|·c_r·(Σ_i ‖B_i‖₂)·(Σ_j ‖A_j‖₂)        B_i row of B, A_j column of A

an equality at r = 1. With the other factor held, P is a group lasso, whose proximal step after an optimiser step of rate lr is

    B_i ← B_i·max(0, 1 - lr·λ_B/(h_i·‖B_i‖₂)),   λ_B = λ·|s|·c_r·Σ_j ‖A_j‖₂          then A_j likewise, with the new B

h_i is what the optimiser divides a gradient by: the mean over the group of √v̂ + ε for Adam and AdamW, of √v + ε for RMSprop,
1 for SGD. So a group rests at zero while ‖∂L/∂B_i‖₂ <= λ_B whatever the rate, and one λ means the same to both solvers. With
gradients clipped by κ <= 1, λ is multiplied by κ too. Since B = 0 makes λ_A = 0 and A = 0 makes λ_B = 0, the step never zeroes
both factors of a layer, and a zero row of B keeps its gradient s·G·Aᵀ. The group lasso on two factors in turn is a form of
proximal alternating linearised minimisation (Bolte, Sabach, Teboulle 2014); SoRA (arXiv 2311.11696) thresholds a gate per rank
after AdamW's step in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paft.errors import UsageError
from paft.train.l1 import Factors, accurate, whole

ADAM = (torch.optim.Adam, torch.optim.AdamW)


def mean_alignment(rank: int) -> float:
    """c_r: the mean of |⟨u, v⟩| over unit vectors u, v of length ``rank``."""
    return math.exp(math.lgamma(rank / 2) - math.lgamma((rank + 1) / 2)) / math.sqrt(math.pi)


class Group(NamedTuple):
    """The rows of a B or the columns of an A: their norms, and what a proximal step takes off them."""

    factor: Tensor
    dim: int
    norm: Tensor
    threshold: Tensor

    def scale(self, by: Tensor) -> None:
        full = whole(self.factor)
        _write(self.factor, (accurate(full) * by.unsqueeze(self.dim)).to(full.dtype))


def _groups(layers: Iterable[Factors], optimizer: Any, strength: float, scaled: bool, rate: str) -> Iterator[Group]:
    """B's rows, then A's columns, layer by layer; each is computed when it is asked for, so A's threshold sees the new B."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for _, A, B, s in layers:
        weight = strength * (abs(s) if scaled else 1.0) * mean_alignment(A.shape[0])
        for factor, dim, other in ((B, 1, A), (A, 0, B)):
            if not factor.requires_grad or (adaptive(optimizer) and not optimizer.state.get(factor)):
                continue  # frozen, or without a gradient so far
            group = groups[id(factor)]
            others = torch.linalg.vector_norm(accurate(whole(other)), dim=1 - dim).sum()
            threshold = group.get(rate, group["lr"]) * weight * others / divisor(optimizer, group, factor).mean(dim)
            yield Group(factor, dim, torch.linalg.vector_norm(accurate(whole(factor)), dim=dim), threshold)


@torch.no_grad()
def proximal_step(layers: Iterable[Factors], optimizer: Any, strength: float, *, scaled: bool = True) -> None:
    """Shrink rows of B, then columns of A, by ``strength`` = λ·κ; call it after ``optimizer.step`` with the rate of that step.

    Raises UsageError for an optimiser whose step is not a gradient divided by something that can be read.
    """
    for group in _groups(layers, optimizer, strength, scaled, "lr"):
        group.scale(torch.where(group.norm > group.threshold, 1 - group.threshold / group.norm, 0.0))


@torch.no_grad()
def settle(layers: Iterable[Factors], optimizer: Any, strength: float, *, scaled: bool = True) -> None:
    """Zero the groups that one step at the schedule's base rate would zero, and leave the others as they are.

    For the last step of a run: noise lifts resting groups by parts of a step, and with a rate near zero they do not fall back. A
    run that is stopped early ends without it.
    """
    for group in _groups(layers, optimizer, strength, scaled, "initial_lr"):
        group.scale((group.norm > group.threshold).to(group.norm.dtype))


@torch.no_grad()
def settled(layers: Iterable[Factors], optimizer: Any, strength: float, *, scaled: bool = True) -> float:
    """The share of δ that `settle` would leave at exactly zero."""
    zero = entries = 0
    for factors in layers:
        left = {0: factors.A.shape[1], 1: factors.B.shape[0]}
        entries += left[0] * left[1]
        for group in _groups([factors], optimizer, strength, scaled, "initial_lr"):
            left[group.dim] = int((group.norm > group.threshold).sum())
        zero += factors.A.shape[1] * factors.B.shape[0] - left[0] * left[1]
    return zero / max(entries, 1)


def _write(factor: Any, value: Tensor) -> None:
    if hasattr(factor, "full_tensor"):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = factor.device_mesh
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim)  # each process holds all of it
    factor.copy_(value)


def divisor(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """What the optimiser divides each entry of a gradient by, of the shape of ``parameter``; UsageError if that is not known."""
    kind, state = _kind(optimizer), optimizer.state[parameter]
    if kind in ADAM and not group["amsgrad"]:
        unbiased = whole(state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
        return unbiased.sqrt() + group["eps"]
    if kind is torch.optim.RMSprop and not group["centered"]:
        return whole(state["square_avg"]).sqrt() + group["eps"]
    if kind is torch.optim.SGD:
        return torch.ones_like(whole(parameter))
    raise UsageError(f"the proximal solver does not know the steps of {kind.__name__}", hint="set trainer.optim to adamw_torch")


def adaptive(optimizer: Any) -> bool:
    """Whether a step has the size of the rate, whatever the size of the gradient."""
    return _kind(optimizer) in (*ADAM, torch.optim.RMSprop)


def _kind(optimizer: Any) -> type:
    return type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
