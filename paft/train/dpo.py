"""TRL's preference trainers that have a reference, with the penalty mixed in: DPO and its kin, KTO."""

from __future__ import annotations

from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from paft.train.penalised import Penalised


class PenalisedDPOTrainer(Penalised, DPOTrainer):
    """L = -log σ(β·(Δ_chosen - Δ_rejected)) + penalty, Δ = log π/π_ref summed over an answer's tokens (DPO, eq. 7).

    That is the loss ``sigmoid``; TRL's other losses of pairs are functions of the same two Δ.
    """

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")


class PenalisedKTOTrainer(Penalised, KTOTrainer):
    """L = w·(1 - σ(±β·(Δ - KL))) + penalty, + for a desirable answer and - for an undesirable one (KTO, eq. 7 and 8).

    KL is the mean Δ of each prompt with its neighbour's answer in the batch, not below 0 and without gradient.
    """

    reference_columns = ("ref_logps", "ref_KL_logps")
