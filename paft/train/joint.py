"""One trainer for two objectives; a schedule says which of them a step takes.

    step ──> schedule(step, gaps) ──> {"dpo": weight, "sft": weight} ──> batches of these ──> Σ weight·loss ──> one Adam step

One decision an *optimiser* step, whatever the accumulation, the same on every process; each data set cycles on its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from trl.trainer.sft_config import SFTConfig

from paft.data import Row
from paft.errors import UsageError
from paft.evaluate import Held
from paft.models import device
from paft.train import budget, losses, preference
from paft.train.gaps import Gaps
from paft.train.heldout import EVALUATED, HeldOut
from paft.train.optima import Optima
from paft.train.options import check_options
from paft.train.penalised import Penalised
from paft.train.precompute import precompute
from paft.train.schedules import OBJECTIVES, SCHEDULES, Schedule
from paft.train.spending import Spending
from paft.train.twosets import TwoSets

if TYPE_CHECKING:
    from paft.recipe import JointRecipe
    from paft.train.reference import Reference

LETTERS = {"dpo": "D", "sft": "S"}


class TwoObjectives(Spending, TwoSets):
    """L = Σ_objective weight·loss, the weights by ``schedule``."""

    schedule: Schedule
    gaps: Gaps
    weights: Mapping[str, float]
    epochs: float  # that the budget is; 1 where it is none of epochs
    taken = ""  # the objective of each step so far: D, S, or B for both
    told_of = 0  # of these, how many an evaluation has told of
    tokens = 0  # that are no padding, in all batches trained on, over all processes

    def follow(self, schedule: Schedule, gaps: Gaps, max_tokens: int | None = None) -> None:
        """Train by ``schedule``; call once before ``train``."""
        self.schedule, self.gaps = schedule, gaps
        self.spend(max_tokens, schedule.steps)
        self.epochs = 1.0 if max_tokens or self.args.max_steps > 0 else max(1.0, self.args.num_train_epochs)
        self.args.max_steps = schedule.steps

    def get_train_dataloader(self) -> DataLoader:
        """A clock, one pass of which is an epoch, or the whole of another budget; the batches come from ``self.batches``."""
        ticks: Any = range(math.ceil(self.schedule.steps / self.epochs) * self.args.gradient_accumulation_steps)
        return DataLoader(ticks, batch_size=1, collate_fn=_tick, generator=torch.Generator())  # draws from nobody else's

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        phases = [length for length in self.schedule.phases if length]
        if self.lr_scheduler is None and len(phases) > 1:
            self.lr_scheduler = budget.scheduler(self.args, optimizer or self.optimizer, phases)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        ticks, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if step in self.schedule.starts:
            optimizer: Any = self.optimizer
            optimizer.optimizer.state.clear()
        if self.schedule.due(step):
            self.gaps.see(self._look(len(ticks), device))
        weights = self.schedule(step, self.gaps.now)
        self.weights = {name: weights[name] for name in OBJECTIVES if weights.get(name)}
        drawn = {name: self.batches[name].take(len(ticks)) for name in self.weights}
        self.items = {name: self._get_num_items_in_batch(batches, device) for name, batches in drawn.items()}
        self.loss_is_scaled_for_ga = all(self.summed(name, items) for name, items in self.items.items())
        self.losses: dict[str, list[float]] = {name: [] for name in drawn}
        self.taken += LETTERS[next(iter(drawn))] if len(drawn) == 1 else "B"
        count = sum(_tokens(batch) for batches in drawn.values() for batch in batches)
        self.tokens += int(self.accelerator.reduce(count, "sum").item())  # type: ignore[union-attr]
        self.close()
        return [{name: batches[i] for name, batches in drawn.items()} for i in range(len(ticks))], None

    @torch.no_grad()
    def _look(self, count: int, device: Any) -> dict[str, float]:
        """Both losses on the batches that come next, without a graph."""
        model: Any = self.model_wrapped
        found = {}
        model.eval()
        for name in OBJECTIVES:
            batches = self.batches[name].peek(count)
            items = self._get_num_items_in_batch(batches, device)
            if name == "dpo":
                for batch in batches:
                    self.refer(model, batch)
            with self.compute_loss_context_manager():
                losses = torch.stack([self.loss_of(name, model, dict(batch), items) for batch in batches])
            found[name] = self.accelerator.reduce(losses.sum() if self.summed(name, items) else losses.mean(), "mean").item()  # type: ignore[union-attr]
        self._metrics["eval"].clear()  # where they have noted themselves
        model.train()
        return found

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        steps, total = self.current_gradient_accumulation_steps, torch.zeros((), device=self.accelerator.device)
        for name, weight in self.weights.items():
            self.batches[name].draw()
            loss = self.loss_of(name, model, inputs[name], self.items[name])
            scale = steps if self.summed(name, self.items[name]) else 1
            mean = self.accelerator.reduce(loss.detach() * scale, "mean").item()  # type: ignore[union-attr]
            self.losses[name].append(mean)
            self._metrics["train"][f"{name}_loss"].append(mean)
            total = total + weight * (loss if self.loss_is_scaled_for_ga else loss * scale)
        stale = self.schedule.compares and not self.schedule.due(self.state.global_step)
        if stale and self.accelerator.gradient_state.sync_gradients:
            self.gaps.see({name: sum(losses) / len(losses) for name, losses in self.losses.items()})
        return total

    def kept(self) -> dict[str, Any]:
        """What a checkpoint needs beside the trainer's own."""
        return {"batches": {name: each.taken for name, each in self.batches.items()}, "gaps": self.gaps.now, "taken": self.taken,
                "told_of": self.told_of, "tokens": self.tokens}

    def restore(self, kept: dict[str, Any]) -> None:
        for name, taken in kept["batches"].items():
            self.batches[name].go_to(taken)
        self.gaps.now, self.taken, self.told_of, self.tokens = dict(kept["gaps"]), kept["taken"], kept["told_of"], kept["tokens"]

    def told(self) -> dict[str, Any]:
        """What an evaluation tells of the steps before it: ``chosen`` are those since the last one."""
        chosen, self.told_of = self.taken[self.told_of:], len(self.taken)
        return {"tokens": self.tokens, "dpo_steps": len(self.taken) - self.taken.count("S"),
                "sft_steps": len(self.taken) - self.taken.count("D"), "chosen": chosen}


class JointTrainer(HeldOut, Penalised, TwoObjectives):
    """L = Σ_objective weight·loss + penalty."""


def _tokens(batch: Any) -> Any:
    """Those that are no padding; packed rows have none."""
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device) if mask is None else mask.sum()


def _tick(found: list[int]) -> dict[str, list[int]]:
    return {"tick": found}


ROLE = "pref"
SFT_OPTIONS = ("packing", "packing_strategy", "assistant_only_loss", "completion_only_loss", "pad_to_multiple_of")


def check(recipe: JointRecipe) -> None:
    """UsageError for a loss that is none of pairs, two budgets, and a share of steps that are not known; loads no model."""
    losses.check_pairs(recipe)
    budget.check(recipe)
    check_options(SFTConfig, recipe.sft_trainer)
    if odd := next((key for key in recipe.sft_trainer if key not in SFT_OPTIONS), None):
        raise UsageError(f"sft_trainer.{odd} has no effect: one trainer has both objectives",
                         hint=f"set it in trainer; sft_trainer takes {', '.join(SFT_OPTIONS)}")


def config(recipe: JointRecipe) -> type:
    return losses.family(recipe).load()[1]


def answers(recipe: JointRecipe, rows: dict[str, list[Row]]) -> list[Row]:
    return rows["pref"]


foreseen = budget.foreseen


def build(recipe: JointRecipe, model: Any, tokenizer: Any, rows: dict[str, list[Row]], scratch: str,
          reference: Reference | None = None, optima: Optima | None = None, *, quiet: bool = False) -> Any:
    """A joint trainer for ``recipe`` on ``rows`` = {"sft": ..., "pref": ...}, and "sft_eval" and "pref_eval" to evaluate on."""
    held, optima = Held(rows.get("sft_eval") or [], rows.get("pref_eval") or [], []), optima or Optima()
    size = recipe.sft_batch_size or recipe.trainer.get("per_device_train_batch_size", 8)
    # Built before the trainer: constructing a config resets accelerate's shared state under a live trainer.
    options: dict[str, Any] = {"per_device_train_batch_size": size, **recipe.sft_trainer}
    config = SFTConfig(output_dir=scratch, seed=recipe.seed, max_length=recipe.trainer.get("max_length", 1024),
                       report_to="none", bf16=False, use_cpu=recipe.trainer.get("use_cpu", device() == "cpu"), **options)
    trainer = preference.construct(recipe, model, tokenizer, rows["pref"], held.pref, scratch, reference, kind=JointTrainer,
                                   learning_rate=2e-5 if recipe.full else 5e-5, **(EVALUATED if held.pref else {}))
    trainer.hold(held, recipe, optima.held)
    kind = SCHEDULES[recipe.method](recipe, 1)
    all_read = kind.compares or (kind.together > 1 and recipe.lam > 0)  # every step may read pairs
    precompute(trainer, recipe.trainer.get("precompute_ref_log_probs"), share=1.0 if all_read else recipe.lam, quiet=quiet)
    trainer.attach(rows["sft"], config)
    schedule = SCHEDULES[recipe.method](recipe, budget.steps(recipe, trainer))
    trainer.follow(schedule, Gaps(optima.step, recipe.smoothing), recipe.max_tokens)
    return trainer
