"""What a running trainer tells: progress with loss and ETA, a JSONL log, and a stop when the held-out loss is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from paft.errors import MismatchError
from paft.progress import Progress


class Watch(TrainerCallback):
    """Draws progress, appends every log record to ``log`` and raises MismatchError on a NaN or infinite ``eval_loss``."""

    def __init__(self, label: str, log: Path, *, quiet: bool = False) -> None:
        self.label, self.log, self.quiet = label, log, quiet
        self.note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = Progress(self.label, state.max_steps, before=state.global_step, quiet=self.quiet)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if state.is_world_process_zero:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if not math.isfinite(float(logs.get("eval_loss", 0))):
            raise MismatchError(f"eval_loss is {logs['eval_loss']} at step {state.global_step}: training has diverged",
                                hint="lower trainer.learning_rate, or look for broken rows in the data")
        if "loss" in logs:
            self.note = f"loss {float(logs.get('task_loss', logs['loss'])):.3f}"
            if "l1" in logs:
                self.note += f"  L1 {float(logs['l1']):.3g}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.__exit__(None, None, None)
