"""Karcher mean: the point of the sphere nearest to all directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, combine_linearly
from paft.merge.sphere import directions, shares


def karcher(deltas: Sequence[Tiled], weights: Sequence[float], *, max_iter: int = 10, tol: float = 1e-5) -> Plan:
    """The mean of the directions on the sphere, at the mean length.

        u_i = δ_i / ‖δ_i‖,   α_i = w_i / Σ w
        m = argmin_m Σ_i α_i arccos²⟨m, u_i⟩,   D = (Σ_i α_i ‖δ_i‖) · m

    δ_i: ΔW of adapter i [rows, columns]; w_i: its weight, 1 by default. From the normalised mean of the u_i, step by
    step along v = Σ_i α_i θ_i / sin θ_i · (u_i - cos θ_i m), m ← cos‖v‖ m + sin‖v‖ v / ‖v‖, at most ``max_iter`` times,
    or until ‖v‖ < ``tol``. Two deltas of one length: ``slerp``.

    Every m is Σ c_i u_i, so the iteration runs on the c_i and the cosines ⟨u_i, u_j⟩ alone: no vector is ever dense,
    and the result is exactly a LoRA of rank Σr. mergekit's ``karcher`` works on whole weights, where all models are
    one direction, with equal α_i; here it is on deltas. A delta of zero has no direction and counts in the mean
    length only; mergekit treats every norm below ``tol`` so. PEFT has none. Raises UsageError for a negative weight,
    weights that sum to zero, or a negative ``max_iter`` or ``tol``.

    Source: Karcher (1977); Grove and Karcher (1973); mergekit's ``karcher`` (arXiv 2603.04972).
    """
    if max_iter < 0 or not tol >= 0:
        raise UsageError(f"karcher takes no negative max_iter or tol ({max_iter}, {tol})")
    alphas = shares("karcher", weights)
    norms, cosines = directions(deltas)
    used = [place for place, norm in enumerate(norms) if norm and alphas[place]]
    coefficients = [0.0] * len(deltas)
    if used:
        length = math.fsum(alpha * norm for alpha, norm in zip(alphas, norms, strict=True))
        products = torch.tensor([[cosines[i][j] for j in used] for i in used], dtype=torch.float64)
        mean = _mean(products, torch.tensor([alphas[i] for i in used], dtype=torch.float64), max_iter, tol)
        for place, value in zip(used, mean.tolist(), strict=True):
            coefficients[place] = length * value / norms[place]
    return combine_linearly(coefficients)


def _mean(products: torch.Tensor, alphas: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """The coefficients c of m = Σ c_i u_i, where ``products[i, j]`` = ⟨u_i, u_j⟩."""

    def norm(c: torch.Tensor) -> float:
        return math.sqrt(max(0.0, float(c @ products @ c)))

    alphas = alphas / alphas.sum()
    if len(alphas) == 1:
        return alphas
    start = norm(alphas)
    mean = alphas / start if start >= tol and start else torch.eye(len(alphas), dtype=torch.float64)[0]
    for _ in range(max_iter):
        cosines = (products @ mean).clamp(-1, 1)
        angles = cosines.acos()
        aside = (angles >= tol) & (angles > 0) & (angles < math.pi - 1e-6)  # to an opposite point every way is as short
        pull = torch.where(aside, alphas * angles / angles.sin(), 0)
        step = pull - (pull @ cosines) * mean
        size = norm(step)
        if size < tol or not size:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / norm(mean)
    return mean
