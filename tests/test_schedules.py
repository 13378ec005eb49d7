"""The schedules of joint training: each against a transcription of its algorithm (arXiv 2410.15483), and their laws.

The papers' loops make T - 1 updates to reach θ_T; paft counts updates, so a transcription here makes T.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from toy import DECAY, LR, START, THRESHOLD, Objective, Objectives, Point

from paft.train.gaps import Gaps
from paft.train.schedules import Alright, Maxright, Mix, Schedule, Sequential

T = 20_000
LAMBDAS = (0.0, 0.5, 0.77, 1.0)
BUDGETS = st.integers(min_value=2, max_value=10**6)
WEIGHTS = st.floats(min_value=0.0, max_value=1.0)
ORDERS = st.sampled_from(["dpo", "sft"])


@pytest.fixture(scope="module")
def objectives() -> Objectives:
    return toy.problem((1.0, 1.0), (0.5, 0.5), target=(0.5, 0.5), other=(1.0, 0.5))


def moved(theta: Point, gradient: Point) -> Point:
    """θ - α·(g + decay·θ) in R²."""
    x, y = theta
    return x - LR * (gradient[0] + DECAY * x), y - LR * (gradient[1] + DECAY * y)


def same(schedule: Schedule, objectives: Objectives, expected: list[Point], stop: float = 0.0) -> None:
    path = toy.train(objectives, schedule, START, LR, DECAY, stop)
    assert len(path) == len(expected) == schedule.steps + 1
    assert max(math.dist(a, b) for a, b in zip(path, expected, strict=True)) <= 1e-12


# The algorithms


def algorithm_1(first: Objective, second: Objective, lengths: tuple[int, int], threshold: float) -> list[Point]:
    path = [START]
    for objective, length in zip((first, second), lengths, strict=True):
        done = 0
        while done < length and objective.value(path[-1]) > threshold:
            path.append(moved(path[-1], objective.gradient(path[-1])))
            done += 1
        path += [path[-1]] * (length - done)
    return path


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("order", [("dpo", "sft"), ("sft", "dpo")])
@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_sequential_is_algorithm_1(objectives: Objectives, lam: float, order: tuple[str, str], threshold: float) -> None:
    lengths = {"dpo": int(lam * T), "sft": T - int(lam * T)}
    first, second = order
    expected = algorithm_1(objectives[first], objectives[second], (lengths[first], lengths[second]), threshold)
    same(Sequential(lam, T, first=first), objectives, expected, threshold)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_mix_is_the_weighted_sum(objectives: Objectives, lam: float) -> None:
    path = [START]
    for _ in range(T):
        (a, b), (c, d) = (objectives[name].gradient(path[-1]) for name in ("dpo", "sft"))
        path.append(moved(path[-1], (lam * a + (1 - lam) * c, lam * b + (1 - lam) * d)))
    same(Mix(lam, T), objectives, path)


@pytest.mark.parametrize("lam", [0.5, 0.77])
def test_alright_is_algorithm_2(objectives: Objectives, lam: float) -> None:
    schedule = Alright(lam, T, seed=3)
    coins = [1 if schedule(step, {}) == {"dpo": 1.0} else 0 for step in range(T)]
    path = [START]
    for i in coins:
        path.append(moved(path[-1], objectives["dpo" if i == 1 else "sft"].gradient(path[-1])))
    same(schedule, objectives, path)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_maxright_with_k_1_is_algorithm_3(objectives: Objectives, lam: float) -> None:
    dpo, sft = objectives["dpo"], objectives["sft"]
    path = [START]
    for _ in range(T):
        theta = path[-1]
        f_1, f_2 = lam * dpo.value(theta), (1.0 - lam) * sft.value(theta)
        path.append(moved(theta, dpo.gradient(theta) if f_1 >= f_2 else sft.gradient(theta)))
    same(Maxright(lam, T, every=1), objectives, path)


def algorithm_4(dpo: Objective, sft: Objective, lam: float, k: int) -> list[Point]:
    """f* = 0 for both."""
    path, stale_1, stale_2 = [START], math.nan, math.nan
    for t in range(1, T + 1):
        theta = path[-1]
        if t % k == 0 or t == 1:
            stale_1, stale_2 = lam * dpo.value(theta), (1.0 - lam) * sft.value(theta)
        if stale_1 >= stale_2:
            stale_1 = lam * dpo.value(theta)
            path.append(moved(theta, dpo.gradient(theta)))
        else:
            stale_2 = (1.0 - lam) * sft.value(theta)
            path.append(moved(theta, sft.gradient(theta)))
    return path


@pytest.mark.parametrize("lam", [0.1, 0.5])
@pytest.mark.parametrize("k", [1, 2, 10, 1000])
def test_maxright_is_algorithm_4(objectives: Objectives, lam: float, k: int) -> None:
    same(Maxright(lam, T, every=k), objectives, algorithm_4(objectives["dpo"], objectives["sft"], lam, k))


def test_stale_gaps_change_the_path(objectives: Objectives) -> None:
    """Else the test above could not tell the ks apart."""
    ends = {toy.train(objectives, Maxright(0.5, T, every=k), START, LR, DECAY)[-1] for k in (1, 2, 10, 1000)}
    assert len(ends) == 4


def test_gaps_are_losses_above_the_optima() -> None:
    gaps = Gaps({"dpo": 0.25, "sft": 1.5})
    gaps.see({"dpo": 0.75, "sft": 2.0})
    gaps.see({"sft": 1.75})
    assert gaps.now == {"dpo": 0.5, "sft": 0.25}


@given(s=st.floats(0.0, 0.99), losses=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=20))
def test_smoothed_gaps_are_a_running_mean(s: float, losses: list[float]) -> None:
    gaps = Gaps({"dpo": 1.0}, smoothing=s)
    for loss in losses:
        gaps.see({"dpo": loss})
    last = len(losses) - 1
    weights = [s**last if i == 0 else (1 - s) * s ** (last - i) for i in range(last + 1)]
    assert sum(weights) == pytest.approx(1.0)
    assert gaps.now["dpo"] == pytest.approx(sum(w * (loss - 1.0) for w, loss in zip(weights, losses, strict=True)), abs=1e-9)


# Sequential's split


@given(lam=WEIGHTS, steps=BUDGETS, first=ORDERS)
def test_phases_share_the_budget_by_lam(lam: float, steps: int, first: str) -> None:
    schedule = Sequential(lam, steps, first=first)
    dpo = schedule.phases[0 if first == "dpo" else 1]
    assert sum(schedule.phases) == steps and min(schedule.phases) >= 0
    assert abs(dpo - lam * steps) <= (0.5 if 0.5 <= lam * steps <= steps - 0.5 else 1.0) + 1e-9
    assert (min(schedule.phases) >= 1) == (0.0 < lam < 1.0)


@given(lam=WEIGHTS, steps=st.integers(1, 60), first=ORDERS)
def test_sequential_takes_each_phase_in_its_place(lam: float, steps: int, first: str) -> None:
    schedule = Sequential(lam, steps, first=first)
    second = {"dpo": "sft", "sft": "dpo"}[first]
    taken = [schedule(step, {}) for step in range(steps)]
    assert taken == [{first: 1.0}] * schedule.phases[0] + [{second: 1.0}] * schedule.phases[1]


@given(lam=WEIGHTS, steps=BUDGETS)
def test_the_others_have_one_phase(lam: float, steps: int) -> None:
    assert [kind(lam, steps).phases for kind in (Mix, Alright, Maxright)] == [(steps,)] * 3


# MAXRIGHT's choice


@given(lam=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), dpo=st.floats(-1.0, 10.0), sft=st.floats(-1.0, 10.0))
def test_maxright_takes_the_larger_weighted_gap(lam: float, dpo: float, sft: float) -> None:
    expected = "dpo" if lam * dpo >= (1.0 - lam) * sft else "sft"
    assert Maxright(lam, 10)(0, {"dpo": dpo, "sft": sft}) == {expected: 1.0}


TIES = [(0.5, 0.3, 0.3), (0.75, 1.0, 3.0), (0.25, 0.0, 0.0)]


@pytest.mark.parametrize(("lam", "dpo", "sft"), TIES)
def test_maxright_ties_go_to_dpo(lam: float, dpo: float, sft: float) -> None:
    schedule = Maxright(lam, 10)
    assert schedule(0, {"dpo": dpo, "sft": sft}) == {"dpo": 1.0}
    assert schedule(0, {"dpo": dpo, "sft": sft + 1e-9}) == {"sft": 1.0}


@given(dpo=st.floats(-10.0, 10.0), sft=st.floats(-10.0, 10.0))
def test_maxright_with_all_the_weight_on_one_takes_that_one(dpo: float, sft: float) -> None:
    """An estimated f* is a mean over batches, so that some batch falls below it: a gap times 0 is larger then."""
    gaps = {"dpo": dpo, "sft": sft}
    assert [{name for name, weight in Maxright(lam, 10)(0, gaps).items() if weight} for lam in (1.0, 0.0)] == [{"dpo"}, {"sft"}]


@given(k=st.integers(1, 50), t=st.integers(1, 10**6))
def test_both_are_evaluated_at_t_1_and_every_k(k: int, t: int) -> None:
    assert Maxright(0.5, 10**6, every=k).due(t - 1) == (t % k == 0 or t == 1)
    assert not any(schedule.due(t - 1) for schedule in (Mix(0.5, 10**6), Alright(0.5, 10**6), Sequential(0.5, 10**6)))


# ALRIGHT's coin


def coins(lam: float, seed: int, steps: int = 10_000) -> list[bool]:
    schedule = Alright(lam, steps, seed)
    return [schedule(step, {}) == {"dpo": 1.0} for step in range(steps)]


@pytest.mark.parametrize("lam", [0.01, 0.25, 0.5, 0.9])
def test_coins_are_fair_and_independent(lam: float) -> None:
    """Shares of DPO, of DPO twice in a row, and of agreement between seeds (also shifted), each within 4.5 standard errors."""
    both = {seed: coins(lam, seed) for seed in (0, 1, 2)}

    def near(hits: int, n: int, p: float) -> bool:
        return abs(hits - n * p) <= 4.5 * math.sqrt(n * p * (1 - p))

    for throws in both.values():
        assert near(sum(throws), len(throws), lam)
        # Pairs that do not overlap, so that they are independent trials.
        assert near(sum(a and b for a, b in zip(throws[::2], throws[1::2], strict=True)), len(throws) // 2, lam * lam)
    for a, b, shift in ((0, 1, 0), (1, 2, 0), (0, 1, 1), (0, 2, 2)):
        pairs = list(zip(both[a][shift:], both[b], strict=False))
        assert near(sum(x == y for x, y in pairs), len(pairs), lam**2 + (1 - lam) ** 2)


def test_coins_at_the_ends_are_certain() -> None:
    assert all(coins(1.0, seed=0)) and not any(coins(0.0, seed=0))


def test_a_coin_knows_neither_the_calls_before_nor_the_gaps() -> None:
    straight = coins(0.5, seed=7, steps=200)
    schedule = Alright(0.5, 200, seed=7)
    assert [schedule(step, {"dpo": 9.0, "sft": 0.0}) == {"dpo": 1.0} for step in reversed(range(200))] == straight[::-1]
    assert straight == coins(0.5, seed=7, steps=300)[:200] != coins(0.5, seed=8, steps=200)


def test_other_processes_throw_the_same() -> None:
    code = "from paft.train.schedules import Alright as A; print(''.join(*zip(*(A(0.5, 64, 5)(i, {}) for i in range(64)))))"
    answers = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[1],
                       capture_output=True, text=True, check=True).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert answers == {"".join("dpo" if coin else "sft" for coin in coins(0.5, seed=5, steps=64))}
