"""examples/toy: what Figure 2 and Theorem 3.3 of ALRIGHT / MAXRIGHT (arXiv 2410.15483) show, and where they do not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import toy_figures
from toy import DECAY, LR, START, THEOREM, Objective, Point

from paft.train.schedules import Alright, Sequential

FEATURES = {"x_1": ((1.0, 1.0), (0.5, 0.5)), "x_2": ((1.0, 0.5), (0.5, 0.5))}  # Table 3: of y_w and y_l, of y and y'


# Objectives against the softmax policy itself, in float64


def log_policy(theta: torch.Tensor, *features: Point) -> torch.Tensor:
    """log π_θ of each answer, section 3.2."""
    return torch.log_softmax(torch.tensor(features, dtype=torch.float64) @ theta, dim=0)


def policy_losses(theta: torch.Tensor, reference: Point, pair: Any, answers: Any, beta: float) -> dict[str, torch.Tensor]:
    """Equations 1 and 4; the target and the chosen answer come first."""
    ratio = log_policy(theta, *pair) - log_policy(torch.tensor(reference, dtype=torch.float64), *pair)
    return {"dpo": -torch.nn.functional.logsigmoid(beta * (ratio[0] - ratio[1])), "sft": -log_policy(theta, *answers)[0]}


def agree(objective: Objective, theta: torch.Tensor, loss: torch.Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
    point = tuple(theta.tolist())
    assert objective.value(point) == pytest.approx(loss.item(), rel=1e-12, abs=1e-14)
    assert objective.gradient(point) == pytest.approx(gradient.tolist(), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("point", [START, (0.0, 0.0), (10.7, -3.4), (-5.5, -3.1), (-40.0, 60.0)])
def test_objectives_are_those_of_the_softmax_policy(point: Point, beta: float) -> None:
    objectives = toy.problem(*FEATURES["x_1"], *FEATURES["x_2"], beta=beta)
    theta = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    expected = policy_losses(theta, toy.reference(*FEATURES["x_1"]), FEATURES["x_1"], FEATURES["x_2"], beta)
    for name, loss in expected.items():
        agree(objectives[name], theta, loss)


def test_the_reference_is_sgd_on_the_chosen_answer() -> None:
    theta = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=LR, weight_decay=DECAY)
    for _ in range(100):
        optimizer.zero_grad()
        (-log_policy(theta, *FEATURES["x_1"])[0]).backward()
        optimizer.step()
    assert toy.reference(*FEATURES["x_1"], steps=100) == pytest.approx(theta.tolist(), rel=1e-12)


# Figure 2


@pytest.fixture(scope="module")
def readings() -> dict[str, dict[str, Any]]:
    found = {}
    for reading, objectives in toy.readings().items():
        paths = toy.trajectories(objectives)
        ideal = {name: math.hypot(*toy.losses(objectives, path[-1])) for name, path in paths.items()}
        found[reading] = {"objectives": objectives, "paths": paths, "ideal": ideal}
    return found


def test_figure_2_sequential_ends_far_from_the_ideal_point_and_the_others_near(readings: dict[str, Any]) -> None:
    figure = readings[toy.FIGURE]
    ideal, start = figure["ideal"], math.hypot(*toy.losses(figure["objectives"], START))
    assert ideal["Sequential"] > start > 4.0
    assert ideal["MAXRIGHT"] < ideal["ALRIGHT"] < 0.3
    assert max(math.dist(figure["paths"][name][-1], figure["paths"]["Mix"][-1]) for name in ("ALRIGHT", "MAXRIGHT")) < 1.0


def test_figure_2_sequential_visits_one_optimum_and_then_the_other(readings: dict[str, Any]) -> None:
    objectives, path = (readings[toy.FIGURE][key] for key in ("objectives", "paths"))
    middle, end = (toy.losses(objectives, path["Sequential"][step]) for step in (10_000, 20_000))
    assert middle[0] <= 0.05 and middle[1] > 5.0
    assert end[1] < 0.07 and end[0] > 4.5


def test_alright_ends_there_whatever_its_coins(readings: dict[str, Any]) -> None:
    objectives = readings[toy.FIGURE]["objectives"]
    for seed in (1, 2, 3):
        path = toy.train(objectives, Alright(0.5, toy.STEPS, seed), START, LR, DECAY, toy.THRESHOLD)
        assert math.hypot(*toy.losses(objectives, path[-1])) < 0.3


def test_with_the_features_of_x_1_negated_the_picture_is_the_same(readings: dict[str, Any]) -> None:
    ideal = readings["φ of x_1 negated"]["ideal"]
    assert ideal["Sequential"] > 0.6 > 0.16 > max(ideal["ALRIGHT"], ideal["MAXRIGHT"])


def test_with_a_small_beta_nobody_arrives(readings: dict[str, Any]) -> None:
    """DPO's gradient is scaled by β: 20,000 steps of 0.01 are too few."""
    assert min(readings["the same, β = 0.1"]["ideal"].values()) > 1.0


def test_to_the_letter_of_table_3_nothing_is_forgotten(readings: dict[str, Any]) -> None:
    """A step on DPO lowers SFT's loss too, so sequential ends in its first phase, beside the others."""
    letter = readings["to the letter"]
    dpo, sft = (letter["objectives"][name].slope for name in ("dpo", "sft"))
    assert sum(a * b for a, b in zip(dpo, sft, strict=True)) > 0
    sequential = letter["paths"]["Sequential"]
    assert toy.losses(letter["objectives"], sequential[10_000])[1] < 0.01 and sequential[10_000] == sequential[-1]
    assert all(distance < 0.06 for distance in letter["ideal"].values())


# Theorem 3.3 and Theorem 4.1


def closed_forms(theta: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Equations 35 to 38: values and gradients."""
    c = (1 + math.exp(5)) / (1 + math.exp(-5))
    half = theta / 2
    return {
        "dpo": (torch.log(1 + c * (1 + half.exp()) / (1 + (-half).exp())), 0.5 / (1 + (-(half + 5)).exp())),
        "sft": (torch.log(1 + (-half).exp()), -0.5 / (1 + half.exp())),
    }


@pytest.mark.parametrize("point", [-25.0, -10.0, -5.0, 0.0, 3.0, 15.0])
def test_closed_forms_belong_to_a_reference_of_minus_ten(point: float) -> None:
    """Not to the θ_ref = -5 of the text, which would have 2.5 in place of 5."""
    theta = torch.tensor([point], dtype=torch.float64, requires_grad=True)
    pair, answers = ((-1.0,), (-0.5,)), ((1.0,), (0.5,))
    for name, (value, gradient) in closed_forms(theta).items():
        agree(THEOREM[name], theta, value.sum())
        agree(THEOREM[name], theta, policy_losses(theta, (-10.0,), pair, answers, 1.0)[name])
        assert gradient.item() == pytest.approx(THEOREM[name].gradient((point,))[0], rel=1e-9)
    named = policy_losses(theta, (-5.0,), pair, answers, 1.0)["dpo"].item()
    assert named != pytest.approx(THEOREM["dpo"].value((point,)), rel=0.1)


def test_the_constants_of_the_proof() -> None:
    """f*_Mix,0.5 = ½·log c*, c* = 173.78; G(0) = 0.271 by (39), where the text says 0.257; it grows from there."""
    least = toy.mix(THEOREM, 0.5, toy.best(THEOREM, 0.5))
    assert math.exp(2 * least) == pytest.approx(173.78, abs=0.005)
    gaps = [toy.mix(THEOREM, 0.5, theta) - least for theta in (0.0, 1.0, 5.0, 20.0)]
    assert gaps[0] == pytest.approx(0.2710, abs=1e-4)
    assert gaps == sorted(gaps)


BUDGETS = (100, 1_000, 10_000)


@pytest.fixture(scope="module")
def gaps() -> Mapping[float, list[tuple[float, float]]]:
    return {lam: [toy.theorem_gaps(lam, steps, seeds=3) for steps in BUDGETS] for lam in toy.LAMBDAS}


@pytest.mark.parametrize("lam", toy.LAMBDAS)
def test_alrights_gap_falls_with_the_budget(gaps: Mapping[float, list[tuple[float, float]]], lam: float) -> None:
    small, medium, large = (alright for _, alright in gaps[lam])
    assert small > medium > large
    assert large < 5e-3


@pytest.mark.parametrize("lam", toy.LAMBDAS)
def test_sequentials_gap_does_not(gaps: Mapping[float, list[tuple[float, float]]], lam: float) -> None:
    (_, (medium, _), (large, alright)) = gaps[lam]
    assert large > medium
    assert large > 0.05 and large > 100 * alright


@pytest.mark.parametrize("lam", [0.5, 0.75, 0.9])
def test_sequential_passes_zero_as_the_proof_says(lam: float) -> None:
    for steps in (1_000, 10_000):
        path = toy.train(THEOREM, Sequential(0.5, steps), (0.0,), toy.STEP_SIZE / math.sqrt(steps))
        assert path[-1][0] >= 0


def test_sufficiently_large_depends_on_lam() -> None:
    """For a small λ the path of SFT runs through the optimum of the mix: at that budget the gap is near 0, later it is not."""
    passing, later = (toy.final_gap(Sequential(0.5, steps), 0.1) for steps in (1_000, 10_000))
    assert passing < 2e-3 < 0.05 < later


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("step_size", [0.1, 1.0, 4.0])
def test_alright_keeps_the_bound_of_theorem_4_1(lam: float, step_size: float) -> None:
    """(54) + (56): E[G] <= ‖θ_1 - θ*‖²/(2·α0·√T) + (2 + log(T-1))·M²·α0/(2·√T), here M = ½."""
    for steps in (100, 1_000):
        mean = statistics.fmean(toy.final_gap(Alright(lam, steps, seed), lam, step_size=step_size) for seed in range(3))
        far = toy.best(THEOREM, lam) ** 2 / (2 * step_size * math.sqrt(steps))
        assert mean <= far + (2 + math.log(steps - 1)) * 0.25 * step_size / (2 * math.sqrt(steps))


def test_the_bound_as_printed_in_51_does_not_hold() -> None:
    """It has α0 above the line: ‖θ_1 - θ*‖²·α0/(2·√T). With a small α0 one cannot get far in T steps."""
    lam, steps, step_size = 0.9, 100, 0.1
    printed = step_size * (toy.best(THEOREM, lam) ** 2 + (2 + math.log(steps - 1)) * 0.25) / (2 * math.sqrt(steps))
    assert toy.final_gap(Alright(lam, steps), lam, step_size=step_size) > printed


# The script


def test_figures_are_drawn(readings: dict[str, Any], gaps: Any, tmp_path: Path) -> None:
    figure = readings[toy.FIGURE]
    toy_figures.figure2(figure["objectives"], figure["paths"], tmp_path / "figure2.png")
    toy_figures.theorem33(THEOREM, gaps, BUDGETS, tmp_path / "theorem33.png")
    for name in ("figure2.png", "theorem33.png"):
        assert 20_000 < (tmp_path / name).stat().st_size < 150_000
