"""Training by the unified loss: which rows are read, what is logged, and that cutting the work up changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preferencekit import LORA, SGD
from trainkit import distance, factors, identical, parts, pref_rows, sft_rows, start_away_from_zero
from transformers import AutoModelForCausalLM
from uftkit import FEEDBACK, ROWS, TARGETS, JointRecipe, batch, explicit, in_float64, ours, rewards, trained

from paft.train import uft
from paft.train.dense import Start
from paft.train.l1 import penalty
from paft.train.mixture import Mixture
from paft.train.optima import Optima

EIGHT = {"sft": ROWS["sft"][:4], "pref": [*FEEDBACK[:1], *FEEDBACK[3:5]]}


@pytest.mark.parametrize("cut", [(4, 2), (1, 8)])
def test_accumulation_changes_nothing_but_rounding(cut: tuple[int, int], tiny_base: Path, tmp_path: Path) -> None:
    """Two steps of all eight rows, with a penalty, in any number of micro-batches."""
    def moved(size: int, times: int) -> Any:
        trainer = start_away_from_zero(ours(tiny_base, tmp_path, EIGHT, beta=1.0, l1=1e-3, l2=1e-2, trainer={
            **SGD, "max_steps": 2, "per_device_train_batch_size": size, "gradient_accumulation_steps": times}))
        before = factors(trainer)
        trainer.train()
        return {name: tensor - before[name] for name, tensor in factors(trainer).items()}

    whole, parted = moved(8, 1), moved(*cut)
    assert distance(whole, parted) < 1e-6
    assert max(float(tensor.abs().max()) for tensor in whole.values()) > 1e-3


def test_a_training_reads_the_mixture_and_logs_each_kind(tiny_base: Path, tmp_path: Path) -> None:
    """At a rate of zero each record is the definition's mean over the rows that the mixture names, of a short batch too."""
    trainer = start_away_from_zero(ours(tiny_base, tmp_path, lam=0.4, beta=1.0, trainer={
        **SGD, "learning_rate": 0.0, "max_steps": 7, "per_device_train_batch_size": 3}))
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    with torch.no_grad():
        z = rewards(trainer, in_float64(trainer, tiny_base), base, uft.answers(trainer.recipe, ROWS))
    each = explicit("mse", z, TARGETS)
    marks = [False] * 5 + [True] * 8
    order = [list(Mixture(marks, 0.4, 0, lambda epoch=epoch: epoch)) for epoch in (0, 1)]
    steps = [rows[at:at + 3] for rows in order for at in range(0, 13, 3)][:7]
    assert len(steps[4]) == 1
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    groups = {"uft_sft": [not mark for mark in marks], "uft_feedback": marks}
    rewarded = {"rewards/sft": groups["uft_sft"],
                "rewards/chosen": [mark and r > 0.5 for mark, r in zip(marks, TARGETS, strict=True)],
                "rewards/rejected": [mark and r < 0.5 for mark, r in zip(marks, TARGETS, strict=True)]}
    for record, rows in zip(records, steps, strict=True):
        assert record["loss"] == pytest.approx(each[rows].mean().item(), rel=1e-4)
        assert record["task_loss"] == pytest.approx(record["loss"], rel=1e-5)
        for key, kind, values in [*((k, g, each) for k, g in groups.items()), *((k, g, z) for k, g in rewarded.items())]:
            of_kind = [row for row in rows if kind[row]]
            assert (key in record) == bool(of_kind)
            if of_kind:
                assert record[key] == pytest.approx(values[of_kind].mean().item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("lam", "logged", "count"), [(0.0, "uft_sft", 5), (1.0, "uft_feedback", 8)])
def test_an_extreme_share_trains_on_one_kind(lam: float, logged: str, count: int, tiny_base: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_base, tmp_path, {("sft", "pref")[int(lam)]: ROWS[("sft", "pref")[int(lam)]]}, lam=lam)
    assert len(trainer.train_dataset) == count
    trainer.train()
    assert {key for record in trainer.state.log_history for key in record if key.startswith("uft_")} == {logged}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_step_is_the_task_gradient_plus_the_penaltys(accumulation: int, tiny_base: Path, tmp_path: Path) -> None:
    options = {**SGD, "learning_rate": 1e-3, "max_steps": 1, "gradient_accumulation_steps": accumulation}
    free, bound = (start_away_from_zero(ours(tiny_base, tmp_path, l1=l1, l2=l1 / 2, trainer=options)) for l1 in (0.0, 1.0))
    start, parameters = factors(free), dict(free.model.named_parameters())
    value, norm = penalty(free.model, l1=1.0, l2=0.5)
    slope = dict(zip(start, torch.autograd.grad(value, [parameters[name] for name in start]), strict=True))
    free.model.eval(), bound.model.eval()
    held = [trainer.compute_loss(trainer.model, batch(trainer, range(13))).item() for trainer in (free, bound)]
    assert held[0] == held[1] > 0 and "l1" not in bound._metrics["train"]
    free.train()
    bound.train()
    assert distance(factors(bound), {name: tensor - 1e-3 * slope[name] for name, tensor in factors(free).items()}) < 1e-6
    record = next(record for record in bound.state.log_history if "loss" in record)
    assert record["l1"] == pytest.approx(float(norm), rel=1e-5)
    assert record["loss"] == pytest.approx(record["task_loss"] + float(value.detach()), rel=1e-4)


def test_the_proximal_step_gives_exact_zeros(tiny_base: Path, tmp_path: Path) -> None:
    options = {"max_steps": 5, "learning_rate": 1e-2}
    trainer = start_away_from_zero(ours(tiny_base, tmp_path, l1=0.1, l1_solver="proximal", trainer=options))
    trainer.train()
    assert trainer.sparsity()["share_zero"] > 0.1


def test_both_objectives_are_measured_on_held_out_rows(tiny_base: Path, tmp_path: Path) -> None:
    """As for every joint method; gaps where f* is known. The DPO loss starts at ln 2."""
    rows = {**ROWS, "sft_eval": sft_rows(4, seed=8), "pref_eval": pref_rows(4, seed=9)}
    options = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    recipe = JointRecipe(model=str(tiny_base), lora=LORA, lam=0.25, trainer=options)
    trainer = uft.build(recipe, *parts(tiny_base), rows, str(tmp_path), None, Optima(held={"dpo": 0.5, "sft": 1.0}), quiet=True)
    trainer.train()
    found = [record for record in trainer.state.log_history if "eval_dpo_loss" in record]
    assert [record["step"] for record in found] == [0, 2, 4]
    assert found[0]["eval_dpo_loss"] == pytest.approx(math.log(2), rel=1e-4) != found[2]["eval_dpo_loss"]
    for record in found:
        dpo, sft = record["eval_dpo_loss"], record["eval_sft_loss"]
        assert record["eval_loss"] == pytest.approx(0.25 * dpo + 0.75 * sft)
        assert record["eval_ideal_distance"] == pytest.approx(math.hypot(dpo - 0.5, sft - 1.0))
    told = trainer.told()
    assert told["tokens"] == max(record.get("num_tokens", 0) for record in trainer.state.log_history) > 0
    assert told["seconds"] > 0


def test_a_whole_model(tiny_base: Path, tmp_path: Path) -> None:
    """Nothing is moved yet, so z = 0 and the loss is 1/4 on average over r = 0 and 1; then it falls. Its δ is θ − θ_pre."""
    rows = {"sft": sft_rows(3), "pref": pref_rows(3)}
    options = {"max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1}
    trainer = ours(tiny_base, tmp_path, rows, full=True, beta=1.0, l1=1e-6, trainer=options)
    trainer.start = Start(tiny_base, trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.ref_model is None and "ref_logps" in trainer.train_dataset.column_names, "no second model in memory"
    trainer.train()
    losses = [record["task_loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[0] == pytest.approx(0.25, rel=1e-4) and losses[-1] < 0.15
    moved = sum(float((p.detach() - before[name]).abs().sum()) for name, p in trainer.model.named_parameters())
    assert trainer.sparsity()["l1"] == pytest.approx(moved, rel=1e-4) and moved > 1


def test_every_row_of_an_epochs_last_step_is_logged(tiny_base: Path, tmp_path: Path) -> None:
    """Of 13 rows the second of two steps has micro-batches of 2, 2 and 1."""
    options = {**SGD, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = ours(tiny_base, tmp_path, trainer=options)
    trainer.train()
    seen = [record["num_tokens"] for record in trainer.state.log_history if "num_tokens" in record]
    rows = trainer.train_dataset
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    order = list(Mixture(rows["feedback"], 0.5, 0, int))
    assert seen == [sum(lengths[index] for index in order[:end]) for end in (8, 13)]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_resumed_is_unbroken(step: int, tiny_base: Path, tmp_path: Path) -> None:
    """Within the first epoch, at its end, and within the second; `Trainer` reads the checkpoint alone."""
    options: Any = {"per_device_train_batch_size": 4, "save_steps": step, "save_total_limit": 9}
    whole = factors(trained(tiny_base, tmp_path, **options))
    again = trained(tiny_base, tmp_path, tmp_path / f"checkpoint-{step}", **options)
    assert again.state.global_step == 7
    assert identical(whole, factors(again))
