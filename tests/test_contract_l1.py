"""What the L1 term takes for granted of transformers, accelerate and torch; the message says who relies on it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from test_train_penalised import sft_trainer
from transformers import Trainer, get_scheduler
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from paft.train.options import PROXIMAL
from paft.train.proximal import divisor
from paft.train.term import L1Term

SHORT = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "max_grad_norm": 1e-3}


class Witness(TrainerCallback):
    """Notes what holds when each hook of an optimiser step is called."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool, int]] = []

    def look(self, hook: str, state: TrainerState, model: Any) -> None:
        graded = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        self.seen.append((hook, graded, state.global_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.look("begin", state, model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.look("before", state, model)
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3), "L1Term._task_gradients: gradients are clipped before on_pre_optimizer_step"

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.look("after", state, model)
        self.rate = optimizer.param_groups[0]["lr"]
        assert optimizer.step_was_skipped is False, "L1Term.on_optimizer_step asks accelerate's optimiser"

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        self.look("end", state, model)
        assert lr_scheduler.get_last_lr()[0] < self.rate, "proximal_step: in on_optimizer_step it is still that of the step"


def test_the_hooks_of_a_step_come_in_this_order(tiny_base: Path, tmp_path: Path) -> None:
    trainer = sft_trainer(tiny_base, tmp_path, trainer=SHORT)
    trainer.add_callback(witness := Witness())
    trainer.train()
    assert witness.seen == [
        ("begin", False, 0), ("before", True, 0), ("after", True, 0), ("end", False, 1),
        ("begin", False, 1), ("before", True, 1), ("after", True, 1), ("end", False, 2),
    ], "L1Term: λ is set at the beginning, measured before, applied after the step, moved at the end"


def test_clipping_tells_the_norm_before_it(tiny_base: Path, tmp_path: Path) -> None:
    assert list(inspect.signature(Trainer._clip_grad_norm).parameters) == ["self", "model"], "Penalised overrides it"
    trainer = sft_trainer(tiny_base, tmp_path, trainer={**SHORT, "logging_steps": 1})
    trainer.train()
    norm = trainer.state.log_history[-2]["grad_norm"]
    assert norm > 1e-3, "the norm before clipping"
    assert trainer.term.clip == pytest.approx(1e-3 / norm, rel=1e-3), "Penalised._clip_grad_norm: κ = max_grad_norm/(norm + 1e-6)"


def test_a_callback_is_kept_by_arguments_and_attributes() -> None:
    term = L1Term.of(_recipe())
    term.strength, term.travel = 0.25, 0.5
    copy = ExportableState.from_state.__func__(L1Term, term.state())  # type: ignore[attr-defined]
    assert copy.state() == term.state(), "L1Term.state: transformers builds a new callback from it"
    kept = TrainerState(stateful_callbacks=[term]).stateful_callbacks
    assert kept == {"L1Term": term.state()}, "L1Term.on_train_begin looks itself up by name"


def _recipe() -> Any:
    from paft.recipe import SftRecipe

    return SftRecipe(l1_target_sparsity=0.9)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "inverse_sqrt"])
def test_schedules_tell_their_end(name: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)
    end = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(end), "target.slack"
    assert optimizer.param_groups[0]["initial_lr"] == 0.1, "proximal.settle"


@pytest.mark.parametrize("optim", sorted(PROXIMAL))
def test_every_optimiser_that_is_let_in_is_known(optim: str, tiny_base: Path, tmp_path: Path) -> None:
    trainer = sft_trainer(tiny_base, tmp_path, l1=1e-3, l1_solver="proximal", trainer={**SHORT, "optim": optim, "max_steps": 1})
    trainer.train()
    assert isinstance(trainer.optimizer, AcceleratedOptimizer)
    group = trainer.optimizer.param_groups[0]
    assert all(divisor(trainer.optimizer, group, p).shape == p.shape for p in group["params"])


def test_accelerate_names_its_plugins() -> None:
    source = inspect.getsource(AcceleratorState)
    assert "self.fsdp_plugin = fsdp_plugin" in source and hasattr(AcceleratorState, "deepspeed_plugin"), "check_layout"
