"""Checkpoints from which a training comes to the very end that it would have come to unbroken.

`Trainer` keeps weights, optimiser, schedule, RNG and the position in the data. What it forgets is what stands between two lines
of the log: running sums of the loss and of TRL's metrics, and the count of tokens. It also takes a step too many when it goes on
from its last checkpoint, and skips an evaluation at the end of an epoch if it was killed just before. `Keeper` sees to these.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints

from paft.train.work import PROGRESS, Work

NUMBERS = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "_total_train_tokens")
METRICS = ("_metrics", "_stored_metrics")  # of TRL's stable and experimental trainers: mode -> name -> values


class Keeper(TrainerCallback):
    """Completes the checkpoints of ``trainer`` in ``work`` and, where that has one to go on from, restores them.

    No checkpoint is made of the last step (OUT itself is next), unless the best one is wanted, which the last may be. Old ones
    are removed only when the new one is whole, the best one never: ``save_total_limit`` of them stay. Where a stream is read for
    the second time, `Trainer` would not find its place again: the checkpoints of the first time stay the last to go on from.
    """

    def __init__(self, trainer: Any, work: Work) -> None:
        self.trainer, self.work = trainer, work
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self.postponed, self.passes = False, 0
        self.stream = isinstance(trainer.train_dataset, IterableDataset)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.work.checkpoint is None:
            return
        saved = json.loads((self.work.checkpoint / PROGRESS).read_text())
        self.trainer._tr_loss.fill_(saved["loss"])
        for name, value in saved["numbers"].items():
            setattr(self.trainer, name, value)
        for name, modes in saved["metrics"].items():
            for mode, values in modes.items():
                getattr(self.trainer, name)[mode] = defaultdict(list, values)
        if saved["own"]:
            self.trainer.restore(saved["own"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes += 1

    @property
    def lost(self) -> bool:
        return self.stream and self.passes > 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation or a log line at the end of an epoch belongs to its last step: the checkpoint comes after it."""
        late = IntervalStrategy.EPOCH in (args.eval_strategy, args.logging_strategy)
        self.postponed = control.should_save and late and float(state.epoch).is_integer()
        control.should_save &= not self.postponed and self._useful(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = (control.should_save or self.postponed) and self._useful(args, control)
        self.postponed = False

    def _useful(self, args: Any, control: Any) -> bool:
        return args.load_best_model_at_end or not (control.should_training_stop or self.lost)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The last record speaks of all steps, so its seconds do too."""
        if logs and "train_runtime" in logs and self.work.spent:
            share = logs["train_runtime"] / (logs["train_runtime"] + self.work.spent)
            logs["train_runtime"] /= share
            for rate in ("train_samples_per_second", "train_steps_per_second"):
                logs[rate] *= share

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        loss = trainer.accelerator.gather(trainer._tr_loss).mean().item()
        if not state.is_world_process_zero or self.lost:
            return
        saved = {"loss": loss,
                 "numbers": {name: getattr(trainer, name) for name in NUMBERS if hasattr(trainer, name)},
                 "metrics": {name: getattr(trainer, name) for name in METRICS if hasattr(trainer, name)},
                 "own": getattr(trainer, "kept", dict)(), "wall_s": self.work.wall, "log_bytes": self.work.log.stat().st_size}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        scratch = folder / f"{PROGRESS}.new"
        scratch.write_text(json.dumps(saved))
        scratch.rename(folder / PROGRESS)
        rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint, use_mtime=True)
