"""The controller of λ: it ends near its target, moves the right way, and a resumed run goes on as the one that was never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_penalised import sft_trainer
from test_train_term import ADAM, records
from trainkit import factors, identical

from paft.train import target
from paft.train.gauge import gauge


@pytest.mark.parametrize(("solver", "share"), [("subgradient", 0.8), ("proximal", 0.8), ("proximal", 0.5)])
def test_the_controller_ends_near_its_target(solver: str, share: float, tiny_base: Path, tmp_path: Path) -> None:
    options = {**ADAM, "max_steps": 60, "learning_rate": 1e-2, "logging_steps": 6}
    trainer = sft_trainer(tiny_base, tmp_path, rows=8, l1_solver=solver, l1_target_sparsity=share, trainer=options)
    trainer.train()
    found = gauge(trainer.model)
    assert (found.zero if solver == "proximal" else found.below) == pytest.approx(share, abs=0.06)
    assert records(trainer)[-1]["task_loss"] < records(trainer)[0]["task_loss"] - 0.1  # by learning, not by collapsing


def test_an_adapter_of_embeddings_alone_gets_a_lambda_as_soon_as_it_can(tiny_base: Path, tmp_path: Path) -> None:
    """PEFT starts their A at zero, so the first step tells nothing of the entry gradient."""
    trainer = sft_trainer(tiny_base, tmp_path, rows=8, l1_target_sparsity=0.8, l1_solver="proximal",
                          lora={"r": 3, "targets": ["embed_tokens"]}, trainer={**ADAM, "max_steps": 4})
    trainer.train()
    assert [record["l1_lambda"] > 0 for record in records(trainer)] == [False, True, True, True]


def test_the_controller_pushes_towards_its_target_and_knows_its_limits() -> None:
    assert target.moved(1.0, 0.5, 0.9, 100.0) > 1 > target.moved(1.0, 0.99, 0.9, 100.0)
    assert target.moved(1.0, 0.9, 0.9, 100.0) == 1.0
    assert target.moved(1.0, 0.0, 0.9, 100.0) == target.moved(1.0, 0.01, 0.9, 100.0)
    assert target.moved(5.0, 0.0, 0.9, 3.0) == target.largest(3.0, 0.9)
    # |G| <= λ_max for the target's share of Gaussian entries
    draws = 3.0 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert (draws.abs() <= target.largest(3.0, 0.9)).float().mean().item() == pytest.approx(0.9, abs=0.003)


@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("fields", [
    {"l1_solver": "proximal", "l1_target_sparsity": 0.8}, {"l1_target_sparsity": 0.8, "l1_warmup": 2},
    {"l1": 1e-3, "l1_solver": "proximal", "l1_warmup": 0.5},
])
def test_a_resumed_run_is_the_run_that_was_never_cut(
    fields: dict[str, Any], restored: bool, tiny_base: Path, tmp_path: Path
) -> None:
    """Whether or not `Trainer` puts the callbacks back from the checkpoint itself."""
    options = {**ADAM, "max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    whole = sft_trainer(tiny_base, tmp_path / "a", trainer=options, **fields)
    whole.train()
    rest = sft_trainer(tiny_base, tmp_path / "b", trainer=options, **fields)
    rest.args.restore_callback_states_from_checkpoint = restored
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert identical(factors(whole), factors(rest))
    one, other = records(whole)[5:], records(rest)[5:]
    keys = ("l1_lambda", "l1_relative", "l1_reach", "l1")
    assert [[r[k] for k in keys] for r in one] == [[r[k] for k in keys] for r in other] and len(one) == 5
