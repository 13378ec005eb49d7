"""The mixed order of rows: its shares, its passes, its seed."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from paft.train.mixture import Mixture


def epochs(first: int, second: int, share: float, count: int, seed: int = 0) -> list[list[int]]:
    now = [0]
    mixture = Mixture([False] * first + [True] * second, share, seed, lambda: now[0])
    found = []
    for now[0] in range(count):
        found.append(list(mixture))
        assert len(found[-1]) == len(mixture) == first + second
    return found


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize(("first", "second"), [(7, 12), (1, 40), (30, 3)])
def test_the_share_holds_to_within_a_row_in_each_epoch_and_over_all(first: int, second: int, share: float) -> None:
    total, wanted = 0, share * (first + second)
    for done, rows in enumerate(epochs(first, second, share, 9), 1):
        here = sum(index >= first for index in rows)
        total += here
        assert abs(here - wanted) < 1
        assert abs(total - done * wanted) <= 0.5 + 1e-9


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_no_row_comes_again_before_all_of_its_kind_have_come(share: float) -> None:
    times: Counter[int] = Counter()
    for rows in epochs(7, 12, share, 9):
        times.update(rows)
        for kind in (range(7), range(7, 19)):
            counts = [times[index] for index in kind]
            assert max(counts) - min(counts) <= 1
    assert min(times[index] for index in range(19)) >= 3


@pytest.mark.parametrize(("share", "expected"), [(0.0, range(7)), (1.0, range(7, 19))])
def test_an_extreme_share_reads_one_kind(share: float, expected: range) -> None:
    assert {index for rows in epochs(7, 12, share, 2) for index in rows} == set(expected)


def test_the_order_follows_from_the_seed_and_the_epoch() -> None:
    one, again, other = epochs(7, 12, 0.5, 2), epochs(7, 12, 0.5, 2), epochs(7, 12, 0.5, 2, seed=1)
    assert one == again
    assert one[0] != one[1] and one[0] != other[0]


def test_kinds_are_mixed_within_an_epoch() -> None:
    kinds = [index >= 500 for index in epochs(500, 500, 0.5, 1)[0]]
    assert 400 < sum(one != next_ for one, next_ in pairwise(kinds)) < 600


def test_each_pass_over_a_kind_is_in_a_new_order() -> None:
    """Six of twelve rows an epoch: the first halves of two passes are not the same six."""
    halves = [{index for index in rows if index >= 12} for rows in epochs(12, 12, 0.25, 4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(12, 24))
    assert halves[0] != halves[2]
