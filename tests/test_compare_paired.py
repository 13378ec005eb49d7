"""Means, errors and bootstrap intervals against scipy, against all resamples there are, and against the law they claim."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from paft.report.paired import ENOUGH, difference, mean_error

VALUES = [0.3, -1.2, 0.9, 2.5, 0.1]


def test_mean_and_error_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    mean, error = mean_error(VALUES)
    assert mean == pytest.approx(np.mean(VALUES)) and error == pytest.approx(stats.sem(VALUES))
    assert mean_error([4.0])[0] == 4.0 and math.isnan(mean_error([4.0])[1])


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_the_interval_is_that_of_all_resamples(level: float) -> None:
    every = np.array([np.mean(drawn) for drawn in product(VALUES, repeat=len(VALUES))])
    exact = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
    found = difference(VALUES, level=level)
    assert (found.low, found.high) == pytest.approx(exact, abs=0.1 * np.std(every))  # 10,000 draws: 0.03 at 2.5 %
    assert (found.mean, found.n, found.level) == (pytest.approx(np.mean(VALUES)), 5, level)


def test_the_interval_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    one, other = np.random.default_rng(3).normal(size=(2, 12))
    other += one  # what both share is no part of the difference
    theirs = stats.bootstrap((one, other), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, method="percentile",
                             n_resamples=10_000, rng=np.random.default_rng(1)).confidence_interval
    ours = difference(list(one - other))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.12 * ours.error)


@pytest.mark.parametrize(("count", "covered"), [(3, 0.749), (5, 0.846), (10, 0.904), (30, 0.936)])
def test_the_interval_holds_the_mean_as_often_as_it_says(count: int, covered: float) -> None:
    draw = np.random.default_rng(count)
    trials = 600
    found = [difference(list(draw.normal(1.0, 2.0, count)), resamples=500) for _ in range(trials)]
    share = sum(one.low <= 1.0 <= one.high for one in found) / trials
    assert abs(share - covered) < 4 * math.sqrt(covered * (1 - covered) / trials)


def test_shift_scale_sign_and_repetition() -> None:
    found = difference(VALUES)
    assert difference(VALUES) == found
    other = difference([10 - 2 * value for value in VALUES])
    assert (other.mean, other.error) == pytest.approx((10 - 2 * found.mean, 2 * found.error))
    assert (other.low, other.high) == pytest.approx((10 - 2 * found.high, 10 - 2 * found.low), abs=0.1 * other.error)
    assert found.sign == 0 and other.sign == 1 and difference([-1.0, -2.0, -3.0]).sign == -1
    assert difference([0.0, 0.0, 0.0]).sign == 0


@pytest.mark.parametrize("count", range(1, ENOUGH))
def test_too_few_differences_give_no_interval(count: int) -> None:
    found = difference([1.0] * count)
    assert found.mean == 1.0 and math.isnan(found.low) and math.isnan(found.high) and found.sign == 0
