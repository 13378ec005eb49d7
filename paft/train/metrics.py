"""The figures of a finished training, for `paft.json` and the card."""

from __future__ import annotations

import math
from typing import Any


def final(trainer: Any, *, evaluate: bool) -> dict[str, float]:
    """The last logged losses, the L1 term as it ended and, with evaluation data, all that TRL measures on them (unpenalised)."""
    wanted = ("loss", "task_loss", "dpo_loss", "sft_loss", "rewards/accuracies", "rewards/margins", "kl", "uft_sft",
              "uft_feedback", "rewards/sft", "rewards/chosen", "rewards/rejected")
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens")
    last: dict[str, float] = {}
    for record in trainer.state.log_history:
        last.update({key: record[key] for key in wanted if key in record})
    last.update(trainer.sparsity())
    if evaluate:
        held = _evaluated(trainer) or trainer.evaluate()
        last.update({key: value for key, value in held.items() if key.startswith("eval_") and key not in speed})
    if told := getattr(trainer, "told", dict)():
        last |= {key: value for key, value in told.items() if key in ("tokens", "dpo_steps", "sft_steps", "seconds")}
    last["steps"] = trainer.state.global_step
    if trainer.args.load_best_model_at_end:
        last["best_step"] = trainer.state.best_global_step
    return {key: float(f"{value:.6g}") for key, value in last.items() if math.isfinite(float(value))}


def _evaluated(trainer: Any) -> dict[str, float] | None:
    """The evaluation after the last step, where there was one and its model is the one that is saved."""
    if trainer.args.load_best_model_at_end or not trainer.state.log_history:
        return None
    found = [each for each in trainer.state.log_history if "eval_loss" in each and each["step"] == trainer.state.global_step]
    return {key: value for key, value in found[-1].items() if key.startswith("eval_")} if found else None
