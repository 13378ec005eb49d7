"""Trimming keeps the exact count in index order; masks depend on key and index alone; sums do not depend on tiles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paft.errors import UsageError
from paft.merge.drop import Drop, drop
from paft.merge.ops import DIALECTS, DenseTensor, densities, dot, find_dialect, total
from paft.merge.trim import trim

MERGEKIT, PAPER = DIALECTS["mergekit"], DIALECTS["paper"]


def trimmed(data: torch.Tensor, density: float, step: int = 1 << 30, dialect: str = "mergekit") -> torch.Tensor:
    delta = DenseTensor(data, step=step)
    keep = trim(delta, density, DIALECTS[dialect])
    return torch.cat([keep(delta.tile(a, a + step), a) for a in range(0, delta.rows, step)]).reshape(data.shape)


def stable_top(data: torch.Tensor, count: int) -> torch.Tensor:
    """The oracle: a stable sort of all magnitudes, the first ``count`` kept."""
    order = torch.sort(data.flatten().abs(), descending=True, stable=True).indices[:count]
    out = torch.zeros_like(data).flatten()
    out[order] = data.flatten()[order]
    return out.reshape(data.shape)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Matrices with many equal magnitudes and zeros, of every scale that float32 has, or continuous ones."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        levels = torch.randint(-2, 3, (rows, columns), generator=generator).float()
        return levels * draw(st.sampled_from([1.0, 1e-38, 1e-45, 1e30]))
    return torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1.0, 1e-6, 1e-40]))


@settings(deadline=None, max_examples=200)
@given(matrices(), st.floats(0.01, 1.0), st.integers(1, 9), st.booleans())
def test_trim_is_a_stable_sort(data: torch.Tensor, density: float, step: int, wide: bool) -> None:
    data = data.double() if wide else data
    count = data.numel() if density == 1 else max(1, int(density * data.numel()))
    assert torch.equal(trimmed(data, density, step), stable_top(data, count))


def test_equal_magnitudes_are_kept_in_index_order() -> None:
    data = torch.ones(100, 70) * torch.tensor([1.0, -1.0]).repeat(35)
    kept = trimmed(data, 0.3, step=7)
    assert kept.count_nonzero() == 2100
    assert kept.flatten()[:2100].count_nonzero() == 2100


def test_paper_keeps_one_more_and_all_equals() -> None:
    distinct = torch.randperm(50, generator=torch.Generator().manual_seed(0)).float().view(5, 10) + 1
    assert trimmed(distinct, 0.2, dialect="paper").count_nonzero() == 11
    assert trimmed(torch.ones(5, 10), 0.2, dialect="paper").count_nonzero() == 50


@pytest.mark.parametrize("bad", [0, -0.1, 1.5, math.nan, [0.5], [0.5, 0.0]])
def test_density_outside_its_range(bad: object) -> None:
    with pytest.raises(UsageError, match="density"):
        densities(bad, 2)  # type: ignore[arg-type]


def test_unknown_dialect_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        find_dialect("mergkit")
    assert "mergekit" in (caught.value.hint or "")


def splitmix64(key: int, index: int) -> int:
    """SplitMix64's output in Python integers: the oracle for the vectorised one."""
    z = (key + index * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@settings(deadline=None, max_examples=30)
@given(st.integers(-(2**63), 2**63 - 1), st.floats(0.01, 0.99), st.integers(0, 2**33))
def test_mask_is_splitmix64(key: int, density: float, row: int) -> None:
    mask = Drop(key, density).mask(torch.zeros(4, 5), row).flatten().tolist()
    assert mask == [splitmix64(key, row * 5 + i) >> 32 < round(density * 2**32) for i in range(20)]


def test_mask_is_independent_of_tiles_and_differs_between_keys() -> None:
    data = torch.ones(300, 40)
    whole = Drop(7, 0.3).mask(data, 0)
    assert torch.equal(whole, torch.cat([Drop(7, 0.3).mask(data[a : a + 13], a) for a in range(0, 300, 13)]))
    masks = [drop(DenseTensor(data, key), 0.3, seed, False, MERGEKIT)(data, 0) for key in "ab" for seed in (0, 1)]
    for i, left in enumerate(masks):
        for right in masks[:i]:
            assert abs(float((left * right).mean()) - 0.09) < 0.01  # as independent masks overlap


def test_mask_has_its_density_in_every_row_and_column() -> None:
    mask = Drop(123, 0.2).mask(torch.zeros(1000, 1000), 0).float()
    assert abs(float(mask.mean()) - 0.2) < 4 * math.sqrt(0.16 / 1e6)
    for side in (0, 1):  # each mean has a standard deviation of 0.0126; 2000 of them stay within 5
        assert float((mask.mean(dim=side) - 0.2).abs().max()) < 5 * math.sqrt(0.16 / 1000)
    shifted = (mask[:, 1:] - 0.2) * (mask[:, :-1] - 0.2)
    assert abs(float(shifted.mean())) < 5 * 0.16 / 1000


@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_dare_keeps_the_mean_of_each_entry(dialect: str) -> None:
    data = torch.linspace(-1, 1, 200).view(10, 20)
    drops = [drop(DenseTensor(data, "k"), 0.5, seed, True, DIALECTS[dialect])(data, 0) for seed in range(2000)]
    assert float((torch.stack(drops).mean(0) - data).abs().max()) < 5 / math.sqrt(2000)


def test_l1_rescale_restores_the_norm() -> None:
    data = torch.randn(50, 60, generator=torch.Generator().manual_seed(1)).double()
    kept = drop(DenseTensor(data, "k", step=7), 0.1, 0, True, MERGEKIT)(data, 0)
    assert float(kept.abs().sum()) == pytest.approx(float(data.abs().sum()), rel=1e-12)
    kept = drop(DenseTensor(data, "k"), 0.1, 0, True, PAPER)(data, 0)
    assert torch.equal(kept[kept != 0], (data * 10)[kept != 0])


def test_a_tensor_of_which_nothing_is_kept_stays_finite() -> None:
    data = torch.zeros(3, 4)
    assert torch.equal(drop(DenseTensor(data), 0.5, 0, True, MERGEKIT)(data, 0), data)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_sums_do_not_depend_on_tiles(rows: int, step: int, seed: int) -> None:
    left, right = torch.randn(2, rows, 33, generator=torch.Generator().manual_seed(seed))
    whole, tiled = DenseTensor(left), DenseTensor(left, step=step)
    assert dot(whole, DenseTensor(right)) == dot(tiled, DenseTensor(right))
    assert total(whole, lambda x, _: x.abs()) == total(tiled, lambda x, _: x.abs())
    assert dot(whole, DenseTensor(right)) == pytest.approx(float((left.double() * right.double()).sum()))


def test_magnitudes_in_a_band_are_those_of_a_stable_sort() -> None:
    """Many equal magnitudes: the ranks skipped and kept are those of a stable sort, for any density and gamma."""
    data = torch.randint(-3, 4, (7, 9), generator=torch.Generator().manual_seed(1)).float()
    order = data.flatten().abs().sort(descending=True, stable=True).indices
    for density, gamma in itertools.product((0.1, 0.5, 0.9), (0.0, 0.05, 0.3, 0.9)):
        count = max(1, int(density * 63))
        skipped = min(int(gamma * 63), 63 - count)
        want = torch.zeros(63)
        want[order[skipped : skipped + count]] = data.flatten()[order[skipped : skipped + count]]
        got = trim(DenseTensor(data, step=2), density, DIALECTS["mergekit"], gamma)(data, 0)
        assert torch.equal(got.flatten(), want)
