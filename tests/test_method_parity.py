"""The methods beyond mergekit's first ones against mergekit's `merge_tensors` in float64, and the papers where it deviates.

Where mergekit has absolute floors (1e-6) that bend small deltas, the data here is of size 1, and a test of its own shows
the floor and that we do not follow it: adapters are small, and a merge must not depend on their unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from paft.errors import MismatchError
from paft.merge import methods
from paft.merge.drop import RankedDrop, ranked_drop
from paft.merge.ops import DIALECTS, DenseTensor, apply

SHAPE = (19, 31)
WEIGHTS = [[1.0, 1.0, 1.0], [0.3, 0.7, 0.2], [2.0, 0.5, 1.5]]


@pytest.fixture
def deltas() -> list[torch.Tensor]:
    """Three matrices of unit size that share a part, so that no mean of directions is near zero."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return [shared + size * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for size in (1.0, 2.0, 0.5)]


@pytest.fixture
def our_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[torch.Tensor], float, float], None]:
    """Make `torch.bernoulli(p)` return our masks, after checking that p is what ours were drawn with."""

    def install(deltas: list[torch.Tensor], density: float, epsilon: float) -> None:
        def masks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for place, delta in enumerate(deltas):
                rule = ranked_drop(DenseTensor(delta, str(place)), density, epsilon, 0, False, DIALECTS["peft"])
                assert isinstance(rule, RankedDrop)
                yield chances(delta, density, epsilon), rule.mask(delta, 0)

        drawn = masks()

        def bernoulli(p: torch.Tensor) -> torch.Tensor:
            expected, mask = next(drawn)
            assert torch.allclose(p.double(), expected, atol=1e-6)
            return mask.to(p.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)

    return install


def chances(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """MagPrune's probabilities of being kept, by counting the smaller entries of each row."""
    smaller = (delta.abs()[:, None, :] < delta.abs()[:, :, None]).double().sum(dim=2)
    return density - epsilon + 2 * epsilon * smaller / (delta.shape[1] - 1)


def ours(name: str, deltas: list[torch.Tensor], weights: list[float] | None = None, **parameters: Any) -> torch.Tensor:
    return apply(methods.load(name), deltas, weights or [1.0] * len(deltas), **parameters)


def mergekit(name: str, deltas: list[torch.Tensor], *, based: bool = True, **parameters: Any) -> torch.Tensor:
    """mergekit over models of a zero base plus each delta, or over the deltas themselves."""
    from mergekit.merge_methods import merge_tensors

    base = [torch.zeros(SHAPE, dtype=torch.float64)] * based
    index = {"base_index": 0} if based else {}
    return merge_tensors([*base, *deltas], name, parameters=parameters, dtype=torch.float64, **index)


def same(got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-10) -> bool:
    return float((got - want).norm()) <= rtol * float(want.norm())


# Trimmed and dropped at random


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.3, 0.0), (0.8, 0.4), (1.0, 0.1)])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(
    deltas: list[torch.Tensor], weights: list[float], normalize: bool, rescale: bool, density: float, gamma: float, name: str
) -> None:
    given = {"normalize": normalize, "rescale": rescale}
    theirs = mergekit(name, deltas, weight=weights, density=[density] * 3, gamma=[gamma] * 3, **given)
    assert same(ours(name, deltas, weights, density=density, gamma=gamma, **given), theirs)


def test_breadcrumbs_of_each_adapter_and_the_paper_s_percentiles(deltas: list[torch.Tensor]) -> None:
    each = {"density": [0.2, 0.5, 0.9], "gamma": [0.3, 0.1, 0.05]}
    assert same(ours("breadcrumbs", deltas, **each), mergekit("breadcrumbs", deltas, weight=[1.0] * 3, **each))
    sizes = deltas[0].abs()
    inside = (sizes > torch.quantile(sizes, 0.4)) & (sizes <= torch.quantile(sizes, 0.9))  # the paper's percentiles
    got = ours("breadcrumbs", deltas[:1], density=0.5, gamma=0.1)
    assert int(((got != 0) != inside).sum()) <= 2  # an entry at either end


def test_breadcrumbs_keep_one_entry_where_mergekit_keeps_none(deltas: list[torch.Tensor]) -> None:
    assert not mergekit("breadcrumbs", deltas, weight=[1.0] * 3, density=[1e-4] * 3).any()
    assert int(ours("breadcrumbs", deltas[:1], density=1e-4, gamma=0.0).count_nonzero()) == 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_ties_rescaled(deltas: list[torch.Tensor], weights: list[float]) -> None:
    theirs = mergekit("ties", deltas, weight=weights, density=[0.3] * 3, rescale=True)
    assert same(ours("ties", deltas, weights, density=0.3, rescale=True), theirs)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della(
    deltas: list[torch.Tensor], our_draws: Callable[..., None], weights: list[float], rescale: bool, name: str
) -> None:
    """The same probabilities, masks, L1 rescale and vote. mergekit's masks and products are in float32 on the CPU."""
    our_draws(deltas, 0.6, 0.2)
    theirs = mergekit(name, deltas, weight=weights, density=[0.6] * 3, epsilon=[0.2] * 3, rescale=rescale)
    assert same(ours(name, deltas, weights, density=0.6, epsilon=0.2, rescale=rescale), theirs, 1e-6)


def test_della_of_the_paper_divides_each_entry_by_its_own_chance(deltas: list[torch.Tensor]) -> None:
    """mergekit rescales the whole tensor to its L1 norm; the paper makes the mean of every entry right."""
    delta = deltas[0]
    once = ours("della_linear", [delta], density=0.5, epsilon=0.3, dialect="paper")
    want = delta / chances(delta, 0.5, 0.3)
    assert torch.allclose(once[once != 0], want[once != 0], rtol=1e-12)
    draws = torch.stack([ours("della_linear", [delta], density=0.5, epsilon=0.3, dialect="paper", seed=s) for s in range(600)])
    spread = delta.abs() * (1 / chances(delta, 0.5, 0.3) - 1).sqrt() / math.sqrt(600)
    assert float(((draws.mean(0) - delta) / spread).abs().max()) < 5
    shares = (draws != 0).double().mean(0)
    assert float((shares - chances(delta, 0.5, 0.3)).abs().max()) < 5 * math.sqrt(0.25 / 600)


def test_della_keeps_what_mergekit_turns_into_nan() -> None:
    """A row of one entry has no rank: mergekit divides 0 by 0."""
    column = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    kept = ours("della_linear", [column], density=0.5, epsilon=0.2, rescale=False)
    assert 60 < int((kept != 0).sum()) < 140 and torch.isfinite(kept).all()
    with pytest.raises(RuntimeError):
        from mergekit.sparsify import della_magprune

        della_magprune(column, density=0.5, epsilon=0.2)


# By inner products


@pytest.mark.parametrize("filter_wise", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_model_stock(deltas: list[torch.Tensor], filter_wise: bool, count: int) -> None:
    given = deltas[:count]
    assert same(ours("model_stock", given, filter_wise=filter_wise), mergekit("model_stock", given, filter_wise=filter_wise))


def test_model_stock_does_not_depend_on_the_unit(deltas: list[torch.Tensor]) -> None:
    """mergekit's floor under ‖δ₁‖‖δ₂‖ is 1e-6: two small deltas that agree come out shortened to nothing."""
    small = [deltas[0] * 1e-6] * 2
    assert same(ours("model_stock", small), small[0])
    assert float(mergekit("model_stock", small).norm()) < 1e-2 * float(small[0].norm())


def test_model_stock_of_deltas_that_cancel_is_nothing(deltas: list[torch.Tensor]) -> None:
    assert not ours("model_stock", [deltas[0], -deltas[0]]).any()


@pytest.mark.parametrize("given", [{}, {"max_iter": 1}, {"tol": 1e-9, "max_iter": 100}])
@pytest.mark.parametrize("count", [2, 3])
def test_karcher(deltas: list[torch.Tensor], given: dict[str, Any], count: int) -> None:
    """mergekit has no base here: the same formula, applied to the deltas instead of to whole weights."""
    assert same(ours("karcher", deltas[:count], **given), mergekit("karcher", deltas[:count], based=False, **given))


def test_karcher_with_weights_is_where_the_pull_is_zero(deltas: list[torch.Tensor]) -> None:
    """mergekit weighs all alike. The defining equation: Σ α_i log_m(u_i) = 0; for two deltas the slerp at α₂."""
    weights = [0.5, 0.2, 0.3]
    mean = ours("karcher", deltas, weights, max_iter=200, tol=1e-12).flatten()
    assert float(mean.norm()) == pytest.approx(sum(w * float(d.norm()) for w, d in zip(weights, deltas, strict=True)))
    mean = mean / mean.norm()
    units = [delta.flatten() / delta.norm() for delta in deltas]
    angles = [torch.acos(unit @ mean) for unit in units]
    logs = [angle / angle.sin() * (unit - angle.cos() * mean) for unit, angle in zip(units, angles, strict=True)]
    assert float(sum(weight * log for weight, log in zip(weights, logs, strict=True)).norm()) < 1e-10
    pair = [deltas[0], deltas[1] * float(deltas[0].norm() / deltas[1].norm())]
    got = ours("karcher", pair, [0.7, 0.3], max_iter=100, tol=1e-12)
    assert same(got, ours("slerp", pair, [0.7, 0.3]), 1e-9)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize_weights", [True, False])
def test_multislerp(deltas: list[torch.Tensor], weights: list[float], normalize_weights: bool) -> None:
    """mergekit's projection to the tangent plane adds nothing: the plain formula is the same to its eps of 1e-8."""
    theirs = mergekit("multislerp", deltas, weight=weights, normalize_weights=normalize_weights)
    assert same(ours("multislerp", deltas, weights, normalize_weights=normalize_weights), theirs, 1e-7)


def test_multislerp_of_opposites(deltas: list[torch.Tensor]) -> None:
    pair = [deltas[0], -2 * deltas[0]]
    assert same(ours("multislerp", pair), mergekit("multislerp", pair, weight=[1.0, 1.0]))
    corners = [torch.tensor([[math.cos(angle), math.sin(angle)]]).double() for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(MismatchError, match="cancel"):
        ours("multislerp", corners)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [2.0, 0.5]])
@pytest.mark.parametrize(("flatten", "row_wise"), [(True, False), (False, False), (False, True)])
def test_nuslerp(deltas: list[torch.Tensor], weights: list[float], flatten: bool, row_wise: bool) -> None:
    given = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    assert same(ours("nuslerp", deltas[:2], weights, **given), mergekit("nuslerp", deltas[:2], weight=weights, **given))


def test_nuslerp_beside_a_zero_is_linear_and_opposites_stay_small(deltas: list[torch.Tensor]) -> None:
    """mergekit takes a zero for a right angle; we hold that half of nothing and half of δ is δ / 2."""
    zero = torch.zeros_like(deltas[0])
    assert torch.equal(ours("nuslerp", [deltas[0], zero]), deltas[0] / 2)
    assert same(mergekit("nuslerp", [deltas[0], zero], weight=[1.0, 1.0]), deltas[0] * math.sqrt(0.5))
    for given in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
        opposite = ours("nuslerp", [deltas[0], -3 * deltas[0]], [0.75, 0.25], **given)
        assert float(opposite.norm()) < 1e-12 * float(deltas[0].norm())


# By entries


@pytest.mark.parametrize("select_topk", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("count", [2, 3])
def test_sce(deltas: list[torch.Tensor], select_topk: float, count: int) -> None:
    assert same(ours("sce", deltas[:count], select_topk=select_topk), mergekit("sce", deltas[:count], select_topk=select_topk))


def test_sce_does_not_depend_on_the_unit(deltas: list[torch.Tensor]) -> None:
    """Below a mean square of 1e-6 mergekit forgets the energies and weighs all alike; the paper has no such floor."""
    want = ours("sce", deltas)
    small = [delta * 1e-5 for delta in deltas]
    assert same(ours("sce", small), want * 1e-5)
    assert not same(mergekit("sce", small), want * 1e-5, 0.05)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.5])
def test_ram(deltas: list[torch.Tensor], epsilon: float) -> None:
    assert same(ours("ram", deltas, epsilon=epsilon), mergekit("ram", deltas, epsilon=epsilon))


@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 3.0)])
@pytest.mark.parametrize("epsilon", [1e-9, 0.5, 1.5])
def test_ramplus(deltas: list[torch.Tensor], r: float, alpha: float, epsilon: float) -> None:
    """mergekit's ratio of two counts is in float32, whatever the tensors are."""
    given = {"r": r, "alpha": alpha, "epsilon": epsilon}
    assert same(ours("ramplus_tl", deltas, **given), mergekit("ramplus_tl", deltas, **given), 1e-7)


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_nearswap(deltas: list[torch.Tensor], t: float) -> None:
    assert same(ours("nearswap", deltas[:1], t=t), mergekit("nearswap", deltas[:1], t=t))


def test_nearswap_does_not_shrink_what_is_smaller_than_t(deltas: list[torch.Tensor]) -> None:
    """mergekit's floor of 1e-6 under |δ| makes a smaller t a factor."""
    small = deltas[0] * 1e-9
    assert torch.equal(ours("nearswap", [small], t=1e-7), small)
    assert same(mergekit("nearswap", [small], t=1e-7), small * 0.1)
