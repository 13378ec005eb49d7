"""TRL's preference trainers without a reference, with the penalty mixed in: ORPO and, of CPO, SimPO."""

from __future__ import annotations

from typing import Any

from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

from paft.train.penalised import Penalised


class _OldStyle:
    """What these trainers lack of today's: rows without an answer within ``max_length`` dropped (they make the loss NaN), the
    store ``_metrics``, and training values in the record that ends a short run."""

    _stored_metrics: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_dataset = self.train_dataset.filter(_has_answers)
        self.eval_dataset = self.eval_dataset and self.eval_dataset.filter(_has_answers)

    @property
    def _metrics(self) -> Any:
        return self._stored_metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # TRL takes every record without `loss` for one of an evaluation
            self._stored_metrics["eval"].update(self._stored_metrics.pop("train", {}))
        super().log(logs, start_time)  # type: ignore[misc]


class PenalisedORPOTrainer(Penalised, _OldStyle, ORPOTrainer):
    """L = NLL(prompt and chosen) - β·log σ(log odds(chosen) - log odds(rejected)) + penalty (ORPO, eq. 6 and 7).

    odds = p/(1-p) with p the geometric mean of an answer's token probabilities; β is the paper's λ.
    """


class PenalisedCPOTrainer(Penalised, _OldStyle, CPOTrainer):
    """L = -log σ(β·(m_chosen - m_rejected) - γ) + penalty, m = mean log-probability of a token (SimPO, eq. 6).

    γ is ``trainer.simpo_gamma``.
    """


def _has_answers(row: dict[str, Any]) -> bool:
    return all(any(label != -100 for label in row[f"{answer}_labels"]) for answer in ("chosen", "rejected"))
