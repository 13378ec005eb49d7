"""The one seam: a mixin that adds the penalty to any TRL trainer's loss and logs the parts apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paft.errors import MismatchError
from paft.train.distributed import check_layout, shard_on_cpu
from paft.train.l1 import penalty
from paft.train.term import L1Term

if TYPE_CHECKING:
    from paft.recipe import TrainRecipe


class Penalised:
    """Mix in before a TRL trainer: ``class SparseSFT(Penalised, SFTTrainer)``; set ``trainer.recipe`` after construction.

    The penalty is added once per optimiser step (on the last micro-batch) and in train mode only, so ``eval_loss`` is the pure
    task loss. Trainers that divide the loss by the accumulation steps afterwards (DPO: ``loss_is_scaled_for_ga`` is False) get
    it multiplied by them first. Every process adds the whole penalty, and averaging their gradients leaves it as it is.

    Logged: ``task_loss``, and of an L1 term what `L1Term.report` measures; ``l1`` is the mean of the ‖δ‖₁ that the losses of
    the record contain. A task loss that is no finite number is a MismatchError at once: `Trainer` would replace it by the mean
    of the others in its log and train on. Building a trainer raises MismatchError where the factors cannot be seen.
    """

    model: Any
    accelerator: Any
    _metrics: Any

    def create_accelerator_and_postprocess(self) -> None:
        shard_on_cpu(self.args)  # type: ignore[attr-defined]
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        check_layout(self.accelerator.state)

    @property
    def recipe(self) -> TrainRecipe:
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: TrainRecipe) -> None:
        self._recipe = recipe
        if recipe.full and (recipe.l1 or recipe.l2) and self.is_fsdp_enabled:  # type: ignore[attr-defined]
            raise MismatchError("the L1 term of full fine-tuning needs whole weights, and FSDP2 shards them",
                                hint="use DDP, or a LoRA")
        self.remove_callback(L1Term)  # type: ignore[attr-defined]
        self.add_callback(L1Term.of(recipe))  # type: ignore[attr-defined]

    @property
    def term(self) -> L1Term:
        """The live one: `Trainer` replaces its callbacks when it restores their states from a checkpoint."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, L1Term))  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.model.training:
            return result
        loss = result[0] if return_outputs else result
        task = self.accelerator.reduce(self._unscaled(loss.detach(), num_items_in_batch), "mean")
        self._metrics["train"]["task_loss"].append(self._finite(task.item()))
        if any(self.term.in_loss().values()) and self.accelerator.gradient_state.sync_gradients:
            loss = loss + self._penalty(num_items_in_batch).to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def _penalty(self, num_items_in_batch: Any) -> Tensor:
        value, norm = self._measured()
        if math.isfinite(size := norm.item()):
            self._metrics["train"]["l1"].append(size)
        return value if self._scaled_already(num_items_in_batch) else value * self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

    def _measured(self) -> tuple[Tensor, Tensor]:
        """(the penalty, ‖δ‖₁) of this step."""
        return penalty(self.model, **self.term.in_loss(), scaled=self.term.scaled)

    def _scaled_already(self, num_items_in_batch: Any) -> bool:
        flag = self.loss_is_scaled_for_ga  # type: ignore[attr-defined]
        return num_items_in_batch is not None if flag is None else flag

    def _unscaled(self, loss: Tensor, num_items_in_batch: Any) -> Tensor:
        """The mean task loss of the whole optimiser step, up to micro-batches of unequal token counts."""
        scaled = self._scaled_already(num_items_in_batch)
        return loss * self.current_gradient_accumulation_steps if scaled else loss  # type: ignore[attr-defined]

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise MismatchError(f"the loss is {loss} at step {step}: training has diverged",
                                hint="lower trainer.learning_rate, or look for broken rows in the data")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        self.term.clip = min(1.0, self.args.max_grad_norm / (float(norm) + 1e-6))  # type: ignore[attr-defined]
        return norm

    def sparsity(self) -> dict[str, float]:
        """What the log says of the L1 term, for the adapter as it is now; nothing without the term."""
        return self.term.report(self.model, self.optimizer) if self.term.active else {}  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # the record of the end closes a short run
            logs.update(self.sparsity())
            if "train_loss" in logs:
                self._metrics["train"].pop("l1", None)  # there the value at the end, not a mean
        super().log(logs, start_time)  # type: ignore[misc]

    def _send_telemetry(self) -> None:
        """TRL tells its makers of every trainer that is built; paft tells nobody."""
