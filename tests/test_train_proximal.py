"""The proximal step: an exact prox where that is known, its fixed points, and what must never happen to a factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paft.errors import UsageError
from paft.train.l1 import Factors
from paft.train.proximal import adaptive, divisor, mean_alignment, proximal_step, settle, settled

SCALE = 2.0


def layer(m: int, n: int, r: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.nn.Parameter(torch.randn(r, n, generator=generator, dtype=torch.float64))
    B = torch.nn.Parameter(torch.randn(m, r, generator=generator, dtype=torch.float64))
    return Factors("layer", A, B, SCALE)


def sgd(factors: Factors, rate: float = 0.1, frozen: Tensor | None = None) -> torch.optim.Optimizer:
    if frozen is not None:
        frozen.requires_grad_(False)
    return torch.optim.SGD([{"params": [p for p in factors[1:3] if p.requires_grad], "initial_lr": rate}], lr=rate)


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_mean_alignment_is_the_mean_of_random_cosines(rank: int) -> None:
    u, v = (torch.randn(200_000, rank, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    assert mean_alignment(rank) == pytest.approx((u * v).sum(1).abs().mean().item(), rel=0.01)


def test_at_rank_one_it_is_the_exact_prox_of_the_l1_norm() -> None:
    """argmin_b ½‖b - b0‖² + lr·λ·Σ|s·b_i·a_j|, found by its definition on a fine grid for every entry."""
    factors = layer(6, 9, 1)
    A, B = factors.A.detach().clone(), factors.B.detach().clone()
    strength, rate = 0.03, 0.1
    proximal_step([factors], sgd(factors, rate, frozen=factors.A), strength)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    cost = 0.5 * (grid[None] - B) ** 2 + rate * strength * SCALE * A.abs().sum() * grid[None].abs()
    torch.testing.assert_close(factors.B.detach()[:, 0], grid[cost.argmin(1)], rtol=0, atol=1e-4)
    assert torch.equal(factors.A, A)


@pytest.mark.parametrize("rank", [2, 4])
def test_a_row_shrinks_towards_zero_by_the_weight_of_the_other_factor(rank: int) -> None:
    factors, strength, rate = layer(40, 30, rank), 0.002, 0.1
    before, A = factors.B.detach().clone(), factors.A.detach()
    proximal_step([factors], sgd(factors, rate, frozen=factors.A), strength)
    taken = before.norm(dim=1) - factors.B.detach().norm(dim=1)
    wanted = rate * strength * SCALE * mean_alignment(rank) * A.norm(dim=0).sum().item()
    torch.testing.assert_close(taken, torch.full_like(taken, wanted))
    assert (torch.nn.functional.cosine_similarity(before, factors.B.detach()) > 1 - 1e-12).all()


def test_over_random_directions_the_group_penalty_is_the_l1_norm() -> None:
    """λ means the same to both solvers: P(A, B) = |s|·c_r·‖B‖₂,₁·‖Aᵀ‖₂,₁ equals ‖s·B·A‖₁ up to sampling."""
    for rank in (1, 3, 16):
        _, A, B, s = layer(300, 200, rank)
        group = abs(s) * mean_alignment(rank) * B.norm(dim=1).sum() * A.norm(dim=0).sum()
        assert group.item() == pytest.approx((s * B @ A).abs().sum().item(), rel=1e-12 if rank == 1 else 0.02)


def optimised(kind: str, parameters: list[Any], **options: Any) -> torch.optim.Optimizer:
    return {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}[kind](parameters, **options)


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "sgd"])
def test_the_divisor_is_what_the_optimiser_divides_by(kind: str) -> None:
    """Without momentum an update is -lr·g/divisor."""
    parameter = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    options = {"adamw": {"betas": (0.0, 0.99), "weight_decay": 0.0}}.get(kind, {})
    optimizer = optimised(kind, [parameter], lr=0.1, **options)
    for seed in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        optimizer.step()
        moved = before - parameter.detach()
        torch.testing.assert_close(moved, 0.1 * parameter.grad / divisor(optimizer, optimizer.param_groups[0], parameter))
    assert adaptive(optimizer) == (kind != "sgd")


def test_an_optimiser_with_unknown_steps_is_refused() -> None:
    factors = layer(3, 3, 1)
    optimizer = torch.optim.Adagrad([factors.A, factors.B])
    with pytest.raises(UsageError, match="Adagrad") as caught:
        proximal_step([factors], optimizer, 0.1)
    assert "adamw_torch" in str(caught.value.hint)


def fit(kind: str, strength: float, *, steps: int = 600, rate: float = 0.01) -> tuple[Factors, torch.optim.Optimizer, Tensor]:
    """Regression on a target whose support, but for noise, is 3 rows of 12 and 4 columns of 10; (factors, optimiser, target)."""
    factors = layer(12, 10, 3)
    target = 0.003 * torch.randn(12, 10, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    target[:3, :4] = torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        factors.B.zero_()
        factors.A.mul_(0.3)
    optimizer = optimised(kind, [{"params": [factors.A, factors.B], "initial_lr": rate}], lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        (0.5 * (SCALE * factors.B @ factors.A - target).square().sum()).backward()
        optimizer.step()
        proximal_step([factors], optimizer, strength)
    return factors, optimizer, target


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "sgd"])
def test_exact_zeros_in_the_rows_and_columns_that_carry_nothing(kind: str) -> None:
    how: dict[str, Any] = {"rate": 0.05, "steps": 1500} if kind == "sgd" else {}
    factors, optimizer, target = fit(kind, 0.01, **how)
    settle([factors], optimizer, 0.01)
    rows, columns = (factors.B == 0).all(1), (factors.A == 0).all(0)
    assert rows.tolist() == [False] * 3 + [True] * 9
    assert columns.tolist() == [False] * 4 + [True] * 6
    delta = SCALE * (factors.B @ factors.A).detach()
    assert (delta - target).norm() < 0.1 * target.norm()
    dense = fit(kind, 0.0, **how)[0]
    assert not (dense.B @ dense.A == 0).any()


def test_a_row_rests_exactly_while_its_gradient_is_below_the_weight() -> None:
    """The optimality condition of the group lasso: ‖∂L/∂B_i‖ <= λ·|s|·c_r·Σ‖A_j‖ on resting rows, = on the others."""
    factors, _, target = fit("sgd", 0.05, steps=3000, rate=0.05)
    factors.B.grad = None
    (0.5 * (SCALE * factors.B @ factors.A.detach() - target).square().sum()).backward()
    weight = 0.05 * SCALE * mean_alignment(3) * factors.A.detach().norm(dim=0).sum()
    slope = factors.B.grad.norm(dim=1)  # type: ignore[union-attr]
    resting = (factors.B == 0).all(1)
    assert 0 < resting.sum() < 12
    assert (slope[resting] <= weight * (1 + 1e-6)).all()
    torch.testing.assert_close(slope[~resting], torch.full_like(slope[~resting], weight.item()), rtol=0.05, atol=0)


def test_a_resting_row_still_has_a_gradient_and_comes_back() -> None:
    factors, optimizer, target = fit("adamw", 0.01)
    assert (factors.B[5:] == 0).all()
    target[6, :4] = 3.0
    for _ in range(200):
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.zero_grad()
        (0.5 * (SCALE * factors.B @ factors.A - target).square().sum()).backward()
        assert factors.B.grad is not None and factors.B.grad[6].any()
        optimizer.step()
        proximal_step([factors], optimizer, 0.01)
    assert factors.B[6].norm() > 0.1


@pytest.mark.parametrize("strength", [1e-2, 1e3])
@pytest.mark.parametrize("seed", range(5))
def test_it_never_zeroes_both_factors(strength: float, seed: int) -> None:
    """A layer whose A and B are both zero has no gradient and would be dead."""
    factors = layer(7, 5, 2, seed)
    optimizer = sgd(factors, 1.0)
    for _ in range(20):
        proximal_step([factors], optimizer, strength)
    assert factors.A.any() or factors.B.any()
    assert strength < 1 or not (factors.B @ factors.A).any()


def test_settling_leaves_what_is_large_and_is_counted_beforehand() -> None:
    factors, optimizer, _ = fit("adamw", 0.01)
    with torch.no_grad():
        factors.B[4], factors.A[:, 8] = 1e-9, 1e-9  # what noise leaves at the end of a run
    before = [factors.B.detach().clone(), factors.A.detach().clone()]
    promised = settled([factors], optimizer, 0.01)
    assert all(torch.equal(one, other) for one, other in zip(before, factors[2:0:-1], strict=True))
    settle([factors], optimizer, 0.01)
    kept = (factors.B[:3], factors.A[:, :4])
    assert all(torch.equal(one, other) for one, other in zip(kept, (before[0][:3], before[1][:, :4]), strict=True))
    zero = ((factors.B @ factors.A) == 0).double().mean().item()
    assert promised == pytest.approx(zero) == pytest.approx(1 - 12 / 120)
