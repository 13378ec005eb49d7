"""The methods of joint training, on a language model, against the papers' algorithms written out."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_joint import joint_trainer
from test_train_penalised import SGD, dpo_trainer
from trainkit import distance, factors, identical, start_away_from_zero

from paft.train.optima import Optima
from paft.train.schedules import Alright

STEPS = 14
BEST = {"dpo": 0.55, "sft": 4.0}  # near enough for both objectives to be taken
OPTIONS: dict[str, Any] = {**SGD, "learning_rate": 0.2, "max_steps": STEPS, "per_device_train_batch_size": 2}


def walked(trainer: Any, choose: Any) -> str:
    """The algorithm by hand on the trainer's model and batches: ``choose(t, losses)`` names D or S; plain SGD."""
    taken, model = "", trainer.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    for t in range(1, STEPS + 1):
        def loss(name: str) -> Any:
            (batch,) = trainer.batches[name].peek(1)
            items = trainer._get_num_items_in_batch([batch], trainer.args.device)
            return trainer.loss_of(name, model, dict(batch), items)

        with torch.no_grad():
            values = {name: float(loss(name)) for name in ("dpo", "sft")}
        name = choose(t, values)
        taken += name[0].upper()
        for p, slope in zip(parameters, torch.autograd.grad(loss(name), parameters), strict=True):
            p.data -= OPTIONS["learning_rate"] * slope
        trainer.batches[name].take(1)
    return taken


def algorithm_3(lam: float) -> Any:
    return lambda t, f: "dpo" if lam * (f["dpo"] - BEST["dpo"]) >= (1 - lam) * (f["sft"] - BEST["sft"]) else "sft"


def algorithm_4(lam: float, k: int) -> Any:
    stale: dict[str, float] = {}

    def choose(t: int, f: dict[str, float]) -> str:
        gaps = {"dpo": lam * (f["dpo"] - BEST["dpo"]), "sft": (1 - lam) * (f["sft"] - BEST["sft"])}
        if t % k == 0 or t == 1:
            stale.update(gaps)
        name = "dpo" if stale["dpo"] >= stale["sft"] else "sft"
        stale[name] = gaps[name]
        return name

    return choose


ALGORITHMS = {"3": (1, algorithm_3), "4 at k = 1": (1, partial(algorithm_4, k=1)), "4 at k = 5": (5, partial(algorithm_4, k=5))}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_maxright_is_its_algorithm_step_by_step(name: str, tiny_base: Path, tmp_path: Path) -> None:
    k, algorithm = ALGORITHMS[name]
    fields: dict[str, Any] = {"method": "maxright", "lam": 0.5, "max_eval_steps": k, "optima": Optima(BEST), "trainer": OPTIONS}
    ours, hand = (start_away_from_zero(joint_trainer(tiny_base, tmp_path, rows=16, **fields)) for _ in range(2))
    ours.train()
    taken = walked(hand, algorithm(0.5))
    assert ours.taken == taken
    assert 2 < taken.count("D") < STEPS - 2  # both were taken, so that there was something to decide
    assert distance(factors(ours), factors(hand)) < 1e-6


def test_looking_at_both_objectives_changes_nothing_else(tiny_base: Path, tmp_path: Path) -> None:
    """Where the gaps always say DPO, MAXRIGHT at k = 1 is the DPO trainer to the bit: no batch, metric or mode is disturbed."""
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    always = Optima({"dpo": -100.0, "sft": 100.0})
    both = joint_trainer(tiny_base, tmp_path, rows=16, method="maxright", max_eval_steps=1, optima=always, trainer=options)
    alone = dpo_trainer(tiny_base, tmp_path, trainer=options)
    both.train()
    alone.train()
    assert identical(factors(both), factors(alone))
    for one, other in zip(both.state.log_history[:-1], alone.state.log_history[:-1], strict=True):
        assert {key: one[key] for key in other.keys() - {"epoch"}} == {key: other[key] for key in other.keys() - {"epoch"}}


def test_gaps_are_those_of_the_batches(tiny_base: Path, tmp_path: Path) -> None:
    """With equal optima and no smoothing the last gap of what was taken is its logged loss less f*."""
    options = {**OPTIONS, "max_steps": 4, "gradient_accumulation_steps": 2}
    trainer = joint_trainer(tiny_base, tmp_path, rows=16, method="maxright", max_eval_steps=100, answer=None,
                            optima=Optima(BEST), trainer=options)
    trainer.train()
    last = trainer.taken[-1]
    name = {"D": "dpo", "S": "sft"}[last]
    logged = [record[f"{name}_loss"] for record in trainer.state.log_history if f"{name}_loss" in record][-1]
    assert trainer.gaps.now[name] == pytest.approx(logged - BEST[name], rel=1e-6)


def test_alright_throws_the_schedules_coin(tiny_base: Path, tmp_path: Path) -> None:
    trainer = joint_trainer(tiny_base, tmp_path, method="alright", lam=0.4, seed=3, trainer={**OPTIONS, "max_steps": 20})
    random.seed(99)  # nobody else's generator decides
    trainer.train()
    coin = Alright(0.4, 20, 3)
    assert trainer.taken == "".join(next(iter(coin(step, {})))[0].upper() for step in range(20))
    assert trainer.batches["dpo"].taken == trainer.taken.count("D")
    assert trainer.batches["sft"].taken == trainer.taken.count("S")


@pytest.mark.parametrize("order", ["dpo-sft", "sft-dpo"])
def test_sequential_starts_its_second_phase_afresh(order: str, tiny_base: Path, tmp_path: Path) -> None:
    """Each phase has a learning-rate schedule of its own; Adam forgets the first."""
    options = {"max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
               "lr_scheduler_type": "linear", "warmup_steps": 0}
    trainer = joint_trainer(tiny_base, tmp_path, rows=8, method="sequential", order=order, lam=0.4, trainer=options)
    first, second = ("D" * 4, "S" * 6) if order == "dpo-sft" else ("S" * 6, "D" * 4)
    seen: list[Any] = []
    clear = trainer.get_batch_samples

    def watched(*arguments: Any) -> Any:
        found = clear(*arguments)
        seen.append(len(trainer.optimizer.optimizer.state))
        return found

    trainer.get_batch_samples = watched
    trainer.train()
    assert trainer.taken == first + second
    assert [step for step, size in enumerate(seen) if size == 0] == [0, len(first)]
    rates = [record["learning_rate"] for record in trainer.state.log_history if "learning_rate" in record]
    expected = [1e-2 * (1 - i / len(part)) for part in (first, second) for i in range(len(part))]
    assert rates == pytest.approx(expected)


def test_a_budget_of_tokens_ends_with_the_step_that_spends_it(tiny_base: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": -1, "lr_scheduler_type": "linear"}
    for method, fields in {"alright": {}, "mix": {}, "maxright": {"optima": Optima(BEST)}}.items():
        trainer = joint_trainer(tiny_base, tmp_path, rows=16, method=method, max_tokens=700, trainer=options, **fields)
        trainer.train()
        batch = 2 * 2 * 20  # more than any step has
        assert 700 <= trainer.tokens < 700 + batch
        assert trainer.state.log_history[-2]["learning_rate"] < 0.15 * OPTIONS["learning_rate"]


def test_tokens_are_those_of_the_batches(tiny_base: Path, tmp_path: Path) -> None:
    """One pass over both sets: prompts of pairs count twice, padding never."""
    trainer = joint_trainer(tiny_base, tmp_path, rows=8, method="sequential", trainer={**OPTIONS, "max_steps": 8})
    trainer.train()
    rows, sft = trainer.train_dataset, trainer.sft_rows
    pairs = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert trainer.tokens == pairs + sum(map(len, sft["input_ids"]))
    cost = trainer.tokens_a_step()
    assert 4 * (cost["dpo"] + cost["sft"]) == pytest.approx(trainer.tokens)
