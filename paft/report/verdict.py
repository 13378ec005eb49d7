"""One word and one sentence on a delta, which rescaling it cannot change.

The word is decided by what stays the same when δ is multiplied by a number, so one update trained at another learning rate
keeps it. *Small* is said beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from paft.report.moments import Moments
from paft.report.reference import GAUSSIAN

DEAD_MAX = 1e-9
SPARSE_SUPPORT = 1 / 3
SPARSE_ZEROS = 2 / 3
SMALL_SHARE = 0.5

Word = Literal["sparse", "small", "dense", "dead"]


class Judged(Protocol):
    """What the verdict looks at: `paft.report.groups.Group`."""

    @property
    def tensors(self) -> int: ...
    @property
    def idle(self) -> int: ...
    @property
    def moments(self) -> Moments: ...
    @property
    def n_eff_mean(self) -> float: ...
    @property
    def share_active(self) -> float: ...


@dataclass(frozen=True)
class Verdict:
    """``word``, whether the delta is ``small`` besides, and one ``sentence`` with the numbers behind them."""

    word: Word
    small: bool
    sentence: str

    @property
    def label(self) -> str:
        """``dense``, or ``dense, small``."""
        return f"{self.word}, small" if self.small and self.word in ("dense", "sparse") else self.word

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.word, "small": self.small, "verdict_sentence": self.sentence}


def judge(overall: Judged, threshold: float) -> Verdict:
    """Call a delta dead, small, sparse or dense; the first rule that holds decides.

    1. *dead*: max|s·δ| < 1e-9. Half a unit in the last place of a float32 weight of 0.02 is 9.3e-10, so adding the delta
       changes nothing.
    2. *small*: the delta of a model stored in 16 bits, most of whose changed weights are at most one step of that type away
       from the base's. What is zero may have been rounded away: whether the training was sparse cannot be told.
    3. *sparse*: N_eff/N, as the mean over tensors, is below a third of the Gaussian 2/π, that is 0.212: what a Gaussian
       delta shows with more than two thirds of its entries removed at random; or more than two thirds are exactly 0.
    4. *dense*: the rest.

    Only the first two look at the scale. A sparse or dense delta is *small besides* if the scale makes it look sparser than
    it is: a dense one has at least half of |s·δ| below the threshold outside of idle tensors, a sparse one has there half
    of its energy.
    """
    moments, n_eff = overall.moments, overall.n_eff_mean
    share = f"{percent(moments.share_scaled)} of the entries are below {short(threshold)}"
    idle = f"; {overall.idle} of {overall.tensors} tensors are idle" if overall.idle else ""
    spread = f"N_eff/N {n_eff:.3f}, a Gaussian's {GAUSSIAN.n_eff:.3f}{idle}"
    zeros = moments.zeros / moments.entries
    if moments.max < DEAD_MAX:
        return Verdict("dead", True, f"dead: the largest entry is {moments.max:.1e}, too small to change a weight.")
    base = moments.on_base
    if base and base.moved and base.one_step > SMALL_SHARE * base.moved:
        return Verdict("small", True, f"small: {percent(base.one_step / base.moved)} of the weights that changed moved by one "
                       f"step of their type at most, so its {percent(zeros)} zeros may be rounding, not sparsity ({spread}).")
    if n_eff < SPARSE_SUPPORT * GAUSSIAN.n_eff or zeros > SPARSE_ZEROS:
        small = moments.histogram.energy_below(threshold).value >= SMALL_SHARE
        few = n_eff < SPARSE_SUPPORT * GAUSSIAN.n_eff
        why = "few entries hold the update" if few else f"{percent(zeros)} of the entries are 0"
        also = f"; it is small besides, rms {moments.rms:.1e}" if small else ""
        return Verdict("sparse", small, f"sparse: {why}, at any scale ({spread}); {share}{also}.")
    if overall.share_active >= SMALL_SHARE:
        normal = percent(moments.expected_scaled / moments.entries)
        return Verdict("dense", True, f"dense, only small: {share}, and {normal} of a Gaussian delta of the same rms, "
                       f"{moments.rms:.1e}, would be; the update is spread over many entries ({spread}).")
    return Verdict("dense", False, f"dense: {share}, and the update is spread over most of them ({spread}).")


def short(threshold: float) -> str:
    """1e-5 rather than 1e-05."""
    if 1e-2 <= threshold < 1e4:
        return f"{threshold:g}"
    digits, _, power = f"{threshold:e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def percent(share: float) -> str:
    """``99.97%`` rather than ``100.0%`` for what is not all, ``0.02%`` rather than ``0.0%`` for what is not nothing."""
    for digits in (1, 2, 3):
        text = f"{share:.{digits}%}"
        if share in (0, 1) or float(text[:-1]) not in (0, 100):
            return text
    return f"{'<' if share < 0.5 else '>'}{'0.001' if share < 0.5 else '99.999'}%"
