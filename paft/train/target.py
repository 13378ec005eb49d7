"""A controller that finds the λ at which a wanted share of δ ends at zero.

    log λ ← log λ + gain·clip(logit(target) - logit(share), ±1)        every hundredth part of the run

For the proximal solver ``share`` counts exact zeros. For the subgradient solver it is the share that will be below 1e-5 once the
learning rate has decayed: entries around zero swing by a part of a step, so |δ_ij| < 1e-5 + ½·(lr_t - lr_end)·|s|·‖A_j‖₂ counts,
which becomes the plain count at the end of the run. Steered by the plain count, λ would be driven up for as long as the rate is
high, and the adapter to zero. The logit of the share is close to linear in log λ, so one gain does for any target.

λ starts at a tenth of, and never exceeds, the λ that would hold the target's share of Gaussian entry gradients, |G_ij| <= λ:

    λ_max = rms(G)·Φ⁻¹((1 + target)/2)        with the largest rms(G) seen so far (`paft.train.gauge.entry_gradient`)

A whole row of B rests at about √(r/n) of it, since all its entries pull one way. There is no randomness, and no state but λ
and rms(G).
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

GAIN = 0.3
UPDATES = 100
START = 0.1
EDGE = 1e-3  # shares are kept this far from 0 and 1, where the logit is infinite


def interval(max_steps: int) -> int:
    """Optimiser steps between two moves of λ."""
    return max(1, max_steps // UPDATES)


def largest(peak: float, target: float) -> float:
    """λ_max for the largest rms(G) seen, ``peak``."""
    return peak * NormalDist().inv_cdf((1 + target) / 2)


def moved(strength: float, share: float, target: float, peak: float) -> float:
    """λ after one move."""
    error = _logit(target) - _logit(min(max(share, EDGE), 1 - EDGE))
    return min(strength * math.exp(GAIN * min(max(error, -1.0), 1.0)), largest(peak, target))


def slack(scheduler: Any, max_steps: int) -> float:
    """½·(lr_t - lr_end) of a scheduler of torch; 0 where its end is not known."""
    shapes = getattr(scheduler, "lr_lambdas", None)  # what the names of transformers' schedules mean, but reduce_lr_on_plateau
    return max(0.0, 0.5 * (scheduler.get_last_lr()[0] - scheduler.base_lrs[0] * shapes[0](max_steps))) if shapes else 0.0


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
