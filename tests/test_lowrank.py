"""Low-rank factors against the dense SVD in float64: nearly the best error, and exactly the error that is reported."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from paft.delta import ProductTensor
from paft.errors import MismatchError, UsageError
from paft.merge import methods
from paft.merge.lowrank import POWER, Budget, LowRank, low_rank, product_energy
from paft.merge.merged import Merged, factors, terms
from paft.merge.ops import DenseTensor, apply, combine_linearly


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int) -> torch.Tensor:
    left = randn(rows, 40) * torch.logspace(0, -3, 40)
    return left @ randn(40, columns, seed=1) + 0.01 * randn(rows, columns, seed=2)


def trimmed(rows: int, columns: int) -> torch.Tensor:
    """What TIES makes of two products: not of low rank."""
    deltas = [randn(rows, 4, seed=s) @ randn(4, columns, seed=s + 9) for s in (1, 2)]
    return apply(methods.load("ties"), deltas, [1.0, 1.0], density=0.3)


def flat(rows: int, columns: int) -> torch.Tensor:
    return randn(rows, columns, seed=5)


def true_error(dense: torch.Tensor, found: LowRank) -> float:
    """Of the factors as they are stored, in float32."""
    missing = dense.double() - found.left.float().double() @ found.right.float().double()
    return float(missing.norm() / dense.double().norm())


@pytest.mark.parametrize("shape", [(300, 200), (150, 280), (64, 1)])
@pytest.mark.parametrize("make", [decaying, trimmed, flat])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_nearly_the_best_and_the_error_is_true(shape: tuple[int, int], make: object, rank: int) -> None:
    dense = make(*shape)  # type: ignore[operator]
    found = low_rank("w", DenseTensor(dense), Budget(rank))
    values = torch.linalg.svdvals(dense.double())
    best = float(values[rank:].square().sum().sqrt() / values.norm())
    assert found is not None and found.rank == min(rank, *shape)
    assert true_error(dense, found) <= 1.04 * best + 1e-6
    assert found.lost / found.norm == pytest.approx(true_error(dense, found), abs=1e-6)
    assert found.norm == pytest.approx(float(values.norm()), rel=1e-12)


@pytest.mark.parametrize("make", [decaying, trimmed, flat])
@pytest.mark.parametrize("error", [0.5, 0.05, 1e-6])
def test_a_requested_error_is_reached_with_few_directions(make: object, error: float) -> None:
    dense = make(220, 130)  # type: ignore[operator]
    found = low_rank("w", DenseTensor(dense), Budget(error=error))
    values = torch.linalg.svdvals(dense.double()).square()
    missing = (1 - values.cumsum(0) / values.sum()).clamp(min=0).sqrt()
    needed = int((missing > error).sum()) + 1
    assert found is not None and true_error(dense, found) <= error * (1 + 1e-6) + 1e-7
    assert needed <= found.rank <= 1.15 * needed + 1


def test_bits_follow_from_name_and_seed_not_from_tiles() -> None:
    dense = trimmed(300, 200)

    def run(name: str, step: int, seed: int = 0) -> torch.Tensor:
        found = low_rank(name, DenseTensor(dense, step=step), Budget(8), seed)
        assert found is not None
        return found.left @ found.right

    assert torch.equal(run("w", 1), run("w", 1000))
    assert not torch.equal(run("w", 7), run("v", 7)) and not torch.equal(run("w", 7), run("w", 7, seed=1))


@dataclass(frozen=True)
class Watched:
    """A tensor that notes which rows are read."""

    data: torch.Tensor
    reads: list[tuple[int, int]]
    step: int = 64
    key: str = ""

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        return self.data.shape[1]

    def tile(self, start: int, stop: int) -> torch.Tensor:
        self.reads.append((start, stop))
        return self.data[start:stop]


def test_three_passes_over_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paft.merge.lowrank.TILE_ELEMENTS", 64 * 150)
    reads: list[tuple[int, int]] = []
    low_rank("w", Watched(trimmed(500, 150), reads), Budget(8))
    assert len(reads) == (POWER + 1) * 8 and max(stop - start for start, stop in reads) == 64
    reads.clear()
    assert low_rank("w", Watched(torch.zeros(500, 150), reads), Budget(8)) is None
    assert len(reads) == 8  # nothing is in it: one pass tells


def products(ranks: tuple[int, ...]) -> tuple[Merged, torch.Tensor]:
    parts = [ProductTensor(randn(90, r, seed=r), randn(r, 70, seed=r + 50), 64, "") for r in ranks]
    coefficients = [0.5 - index for index in range(len(ranks))]
    dense = sum(c * p.left.double() @ p.right.double() for c, p in zip(coefficients, parts, strict=True))
    assert isinstance(dense, torch.Tensor)
    return Merged(parts, combine_linearly(coefficients)), dense


@pytest.mark.parametrize("ranks", [(4,), (4, 7), (3, 3, 90)])
@pytest.mark.parametrize("budget", [None, Budget(5), Budget(200), Budget(error=0.2)], ids=str)
def test_sums_of_products_are_cut_as_the_dense_svd_cuts_them(ranks: tuple[int, ...], budget: Budget | None) -> None:
    tensor, dense = products(ranks)
    found = low_rank("w", tensor, budget)
    values = torch.linalg.svdvals(dense)
    assert found is not None
    if budget is None or budget.rank == 200:
        assert (found.rank, found.lost) == (sum(ranks), 0.0)
    elif budget.rank:
        assert found.rank == min(5, sum(ranks))
        assert found.lost == pytest.approx(float(values[found.rank :].norm()), abs=1e-9 * found.norm)
    else:
        assert found.lost <= 0.2 * found.norm < float(values[found.rank - 1 :].norm())
    assert float((dense - found.left @ found.right).norm()) == pytest.approx(found.lost, abs=1e-9 * found.norm)
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-9)


def test_nested_sums_are_one_product() -> None:
    inner, first = products((2, 3))
    outer = Merged([inner, ProductTensor(randn(90, 1), randn(1, 70), 64, "")], combine_linearly([2.0, 3.0]))
    found = factors(outer)
    assert found is not None
    dense = 2 * first + 3 * randn(90, 1).double() @ randn(1, 70).double()
    assert torch.allclose(found[0] @ found[1], dense, rtol=0, atol=1e-12)
    assert product_energy(*found) == pytest.approx(float(dense.square().sum()), rel=1e-12)
    listed: list[ProductTensor] = []
    assert terms(outer, listed) == [[2.0, [[0.5, 0], [-0.5, 1]]], [3.0, 2]] and len(listed) == 3
    assert factors(Merged([DenseTensor(first)], combine_linearly([1.0]))) is None


@pytest.mark.parametrize("options", [{}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"rank": 1.5}, {"error": 1.0}, {"error": 0.0},
                                     {"error": float("nan")}])  # fmt: skip
def test_budgets_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Budget(**options)  # type: ignore[arg-type]


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="delta of w is not of low rank"):
        low_rank("w", DenseTensor(flat(5, 4)), None)
    broken = flat(40, 30)
    broken[3, 4] = float("inf")
    with pytest.raises(MismatchError, match="delta of w holds NaN"):
        low_rank("w", DenseTensor(broken), Budget(2))
