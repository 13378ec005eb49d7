"""The one seam: a mixin that adds the penalty to any TRL trainer's loss and logs the parts apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paft.errors import MismatchError
from paft.train.l1 import penalty, share_below

if TYPE_CHECKING:
    from paft.recipe import TrainRecipe


class Penalised:
    """Mix in before a TRL trainer: ``class SparseSFT(Penalised, SFTTrainer)``; set ``trainer.recipe`` after construction.

    The penalty is added once per optimiser step (on the last micro-batch) and in train mode only, so ``eval_loss`` is the pure
    task loss. Trainers that divide the loss by the accumulation steps afterwards (DPO: ``loss_is_scaled_for_ga`` is False) get
    it multiplied by them first. Logged: ``task_loss``, ``l1`` (‖δ‖₁) and ``share_below_1e-5``. A task loss that is no finite
    number is a MismatchError at once: `Trainer` would replace it by the mean of the others in its log and train on.
    """

    recipe: TrainRecipe
    model: Any
    accelerator: Any
    _metrics: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.model.training:
            return result
        loss = result[0] if return_outputs else result
        self._metrics["train"]["task_loss"].append(self._finite(self._unscaled(loss.detach(), num_items_in_batch).item()))
        if (self.recipe.l1 or self.recipe.l2) and self.accelerator.gradient_state.sync_gradients:
            loss = loss + self._penalty(num_items_in_batch).to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def _penalty(self, num_items_in_batch: Any) -> Tensor:
        value, norm = penalty(self.model, l1=self.recipe.l1, l2=self.recipe.l2, scaled=self.recipe.l1_scaled)
        if self.recipe.l1:
            self._metrics["train"]["l1"].append(norm.item())
        return value if self._scaled_already(num_items_in_batch) else value * self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.recipe.l1 and ("loss" in logs or "train_loss" in logs):  # the record of the end closes a short run
            self._metrics["train"]["share_below_1e-5"].append(self._share())
        super().log(logs, start_time)  # type: ignore[misc]

    def _share(self) -> float:
        return share_below(self.model, scaled=self.recipe.l1_scaled)

    def _send_telemetry(self) -> None:
        """TRL tells its makers of every trainer that is built; paft tells nobody."""
