"""The verdict: one word that rescaling cannot change, for dense, sparse and dead deltas, and what is said beside it."""

from __future__ import annotations

import pytest
import torch
from test_report_sparsity import Factors, Source, all_zero, block_sparse, gaussian, report

from paft.report.sparsity import sparsity
from paft.report.verdict import percent, short


def test_one_dense_update_at_four_scales_has_four_shares_and_is_never_sparse() -> None:
    reports = [report(gaussian, rms) for rms in (5e-7, 5e-6, 2e-5, 1.5e-4)]
    shares = [one.layer_share for one in reports]
    assert shares[0] > 0.99 and shares[-1] < 0.1
    assert shares == sorted(set(shares), reverse=True)
    assert [one.verdict.word for one in reports] == ["dense"] * 4
    assert [one.verdict.small for one in reports] == [True, True, False, False]
    assert [one.overall.n_eff_mean for one in reports] == pytest.approx([reports[0].overall.n_eff_mean] * 4, rel=1e-6)
    assert report(gaussian, 1e-13).verdict.word == "dead"


@pytest.mark.parametrize("rms", [5e-9, 5e-7, 8e-6, 2e-5, 1.5e-4, 1.0])
def test_a_block_sparse_update_is_sparse_at_every_scale(rms: float) -> None:
    assert report(block_sparse, rms).verdict.word == "sparse"


def test_dead_is_dead() -> None:
    assert report(block_sparse, 1e-14).verdict.word == "dead"
    assert sparsity(Source("zero", {"a.0.b": all_zero()})).verdict.word == "dead"


def test_tensors_of_different_scale_are_not_sparse_but_idle_ones_are() -> None:
    scales = {f"layers.{i}.q": gaussian(rms=1e-4 * 3.0**-i, seed=i) for i in range(5)}
    spread = sparsity(Source("spread", scales))
    assert spread.verdict.word != "sparse"
    assert spread.overall.moments.n_eff < spread.overall.n_eff_mean - 0.1  # pooled, it looks sparser than it is
    idle = {f"layers.{i}.q": gaussian(rms=1e-4 if i == 0 else 1e-13, seed=i) for i in range(5)}
    collapsed = sparsity(Source("collapsed", idle))
    assert collapsed.verdict.word == "sparse" and collapsed.overall.idle == 4
    assert "4 of 5 tensors are idle" in collapsed.verdict.sentence


@pytest.mark.parametrize("share, shown", [
    (0.0, "0.0%"), (1.0, "100.0%"), (0.5, "50.0%"), (0.9999, "99.99%"), (0.9999999, ">99.999%"), (1e-9, "<0.001%"),
    (3e-4, "0.03%"),
])  # fmt: skip
def test_a_share_that_is_not_all_is_not_shown_as_all(share: float, shown: str) -> None:
    assert percent(share) == shown


def test_more_than_two_thirds_zeros_are_sparse_even_if_the_rest_is_even() -> None:
    """A delta of equal magnitudes on 30 % of the entries has N_eff/N 0.3, above the limit of 0.212."""
    a, b = torch.ones(1, 100), torch.zeros(100, 1)
    b[:30] = 1e-3
    found = sparsity(Source("even", {"layers.0.q": Factors(a, b)}))
    assert found.overall.n_eff_mean == pytest.approx(0.3) and found.verdict.word == "sparse"
    b[:40] = 1e-3
    assert sparsity(Source("more", {"layers.0.q": Factors(a, b)})).verdict.word == "dense"


def test_a_sparse_delta_can_be_small_besides() -> None:
    large, tiny = report(block_sparse, 1e-3).verdict, report(block_sparse, 1e-7).verdict
    assert (large.label, tiny.label) == ("sparse", "sparse, small") and "small besides" in tiny.sentence


@pytest.mark.parametrize("threshold, shown", [(1e-5, "1e-5"), (2.5e-6, "2.5e-6"), (1e-3, "1e-3"), (0.01, "0.01"), (0.5, "0.5")])
def test_thresholds_are_shown_short(threshold: float, shown: str) -> None:
    assert short(threshold) == shown
