"""What a running trainer tells: progress with loss and ETA, a JSONL log, and a stop when the held-out loss is no number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from paft.errors import MismatchError
from paft.progress import Progress, say

COLLAPSE = """warning: the adapter is collapsing to zero, not becoming sparse: its norm is
  {l1_reach:.2g} of what noise alone would make at this learning rate; lower λ, now {l1_lambda:.2g}"""


def note(logs: dict[str, Any]) -> str:
    """Loss, ‖δ‖₁ and sparsity for the progress line."""
    parts = [f"loss {float(logs.get('task_loss', logs['loss'])):.3f}"]
    if "l1" in logs:
        exact = "share_zero" in logs
        share = float(logs["share_zero"] if exact else logs["share_below_1e-5"])
        parts += [f"L1 {float(logs['l1']):.3g}", f"{share:.0%} {'zero' if exact else '<1e-5'}"]
    return "  ".join(parts)


def collapsing(logs: dict[str, Any]) -> bool:
    """Small, not sparse: most of δ is below 1e-5, and its norm is below a twentieth of what noise alone would make.

    A sparse adapter of the same share keeps a norm (Adam gives each entry that moves a way of its own); an adapter that is small
    because its learning rate is, is small by the same measure and no concern of the penalty. See `L1Term.reach`.
    """
    return logs["share_below_1e-5"] > 0.5 and logs["l1_reach"] < 0.05


class Watch(TrainerCallback):
    """Draws progress, appends every log record to ``log`` and raises MismatchError on a NaN or infinite ``eval_loss``.

    ``told`` says what a record of an evaluation contains beside its losses.
    """

    def __init__(self, label: str, log: Path, *, quiet: bool = False, told: Callable[[], dict[str, Any]] = dict) -> None:
        self.label, self.log, self.quiet, self.told = label, log, quiet, told
        self.note = ""
        self.small = 0  # records in a row
        self.warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = Progress(self.label, state.max_steps, before=state.global_step, quiet=self.quiet)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        told = self.told() if "eval_loss" in logs else {}
        if state.is_world_process_zero:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs, **told}) + "\n")
        if not math.isfinite(float(logs.get("eval_loss", 0))):
            raise MismatchError(f"eval_loss is {logs['eval_loss']} at step {state.global_step}: training has diverged",
                                hint="lower trainer.learning_rate, or look for broken rows in the data")
        if "loss" in logs:
            self.note = note(logs)
        if "l1_reach" in logs:
            self._warn_of_collapse(logs)

    def _warn_of_collapse(self, logs: dict[str, Any]) -> None:
        self.small = self.small + 1 if collapsing(logs) else 0
        if self.small >= 2 and not self.warned:
            self.warned = True
            self.progress.__exit__(None, None, None)  # the bar makes room
            say(COLLAPSE.format(**logs), quiet=self.quiet)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.__exit__(None, None, None)
