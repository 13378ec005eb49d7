"""Both objectives on held-out rows at every evaluation, whatever a trainer minimises: `Trainer.evaluate` for joint training.

    eval_sft_loss        cross-entropy in nats a token over all answer tokens            f_SFT
    eval_dpo_loss        mean of -log σ(β·Δ) against the reference of the training       f_DPO
    eval_pref_accuracy   share of pairs with Δ > 0
    eval_loss            λ·f_DPO + (1-λ)·f_SFT
    eval_*_gap           f - f*, where f* is known                                       (arXiv 2410.15483, section 6.1)
    eval_ideal_distance  √((f_DPO - f*_DPO)² + (f_SFT - f*_SFT)²), where an objective below its f* counts as at it

The two are measured by `paft.evaluate`, the same for every method. Several processes share the batches out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from trl.trainer.utils import use_adapter

from paft.data import Row
from paft.errors import UsageError
from paft.evaluate import Evaluator, Held
from paft.provenance import peak_memory_mb
from paft.recipe import JointRecipe
from paft.train.front import reached, read

EPSILON = 1e-4  # the authors'
EVALUATED = {"eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": True}  # where nothing else is said


def check_pairs(feedback: list[Row]) -> None:
    """UsageError for held-out feedback that is labels or scores."""
    if any("chosen" not in row for row in feedback):
        raise UsageError("the held-out feedback is no pairs, and the DPO loss is measured on pairs",
                         hint="pass pairs as --pref-eval-data, or evaluate later")


class HeldOut:
    """Mix in before a TRL trainer, then `hold`. ``seconds`` are those of training alone."""

    model: Any
    args: Any
    scorer: Evaluator | None = None
    optima: Mapping[str, float]
    lam: float
    before = evaluated = 0.0  # seconds of training and of evaluation in earlier processes
    evaluating = 0.0  # of evaluation in this one

    def hold(self, held: Held, recipe: JointRecipe, optima: Mapping[str, float]) -> None:
        """Measure on ``held``, if it has rows of both objectives; ``optima`` = {"dpo": f*, "sft": f*}, or empty.

        At the recipe's ``stop_front``, or with one at the optima, training ends.
        A second model that is the reference is asked at once, as it may leave the memory; an adapter at the first evaluation.
        """
        self.eval_dataset = None  # `Trainer` wants one where it evaluates, and has no use for it here
        if not (held.sft and held.pref):
            return
        self.optima, self.lam = optima, recipe.lam
        front = read(recipe.stop_front) if recipe.stop_front else []
        ideal = [(optima["dpo"], optima["sft"])] if front and len(optima) == 2 else []
        self.front = [*front, *ideal]
        tokenizer = self.processing_class  # type: ignore[attr-defined]
        size, limit = self.args.per_device_eval_batch_size, self.args.max_length
        share = self.args.process_index, self.args.world_size
        self.scorer = Evaluator(tokenizer, held, None, recipe.beta, size, limit=limit, share=share)
        if self.ref_model is not None:  # type: ignore[attr-defined]
            self.scorer = self.scorer.against(self.ref_model)  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.started = time.monotonic()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started - self.evaluating

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        assert self.scorer is not None
        started, training = time.monotonic(), self.model.training
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            if self.scorer.reference is None:
                self.scorer = self._referred(self.scorer)
            scores = self.scorer(self.model)
        found = {f"{metric_key_prefix}_{name}": value for name, value in self._weighed(scores).items()}
        self.evaluating += time.monotonic() - started
        self.log(dict(found))  # type: ignore[attr-defined]
        self.model.train(training)  # what is logged at the end is of the training
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)  # type: ignore[attr-defined]
        self.control.should_training_stop |= reached((scores["dpo_loss"], scores["sft_loss"]), self.front, EPSILON)
        return found

    def told(self) -> dict[str, Any]:
        """What an evaluation tells beside the losses."""
        cuda = torch.cuda.is_available()
        memory = round(torch.cuda.max_memory_allocated() / 1e6, 1) if cuda else peak_memory_mb()
        below = getattr(super(), "told", dict)()
        spent = round(self.evaluated + self.evaluating, 3)
        return {"seconds": round(self.seconds, 3), "evaluation_seconds": spent, "peak_memory_mb": memory, **below}

    def kept(self) -> dict[str, Any]:
        """What a checkpoint needs beside the trainer's own."""
        spent = {"seconds": self.seconds, "evaluated": self.evaluated + self.evaluating}
        return {**spent, **getattr(super(), "kept", dict)()}

    def restore(self, kept: dict[str, Any]) -> None:
        self.before, self.evaluated = kept.pop("seconds"), kept.pop("evaluated", 0.0)
        if kept:
            super().restore(kept)  # type: ignore[misc]

    @torch.no_grad()
    def _referred(self, scorer: Evaluator) -> Evaluator:
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        name = "ref" if "ref" in getattr(model, "peft_config", ()) else None
        with use_adapter(model, name) if hasattr(model, "peft_config") else nullcontext():
            return scorer.against(model)

    def _weighed(self, scores: dict[str, float]) -> dict[str, float]:
        losses = {"dpo": scores["dpo_loss"], "sft": scores["sft_loss"]}
        found = {"loss": self.lam * losses["dpo"] + (1 - self.lam) * losses["sft"], **scores}
        gaps = {name: losses[name] - best for name, best in self.optima.items()}
        found |= {f"{name}_gap": gap for name, gap in gaps.items()}
        return found | ({"ideal_distance": math.hypot(*(max(gap, 0.0) for gap in gaps.values()))} if len(gaps) == 2 else {})
