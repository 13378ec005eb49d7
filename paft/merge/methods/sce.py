"""SCE: select what varies, calculate weights from energy, erase the minority's sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge.ops import Plan, keep, no_weights, total, totals, weighted_sum
from paft.merge.trim import Trim, top


def sce(deltas: Sequence[Tiled], weights: Sequence[float], *, select_topk: float = 1.0) -> Plan:
    """Select what varies, weigh by energy, erase the minority sign.

        x_i = δ_i on the entries with the largest variance over i
        η_i = ‖x_i‖² / Σ_j ‖x_j‖²,   s = sign(Σ_i x_i),   agree_i = [sign(x_i) = s]
        D = Σ_i η_i x_i agree_i / Σ_i η_i agree_i

    δ_i: ΔW of adapter i [rows, columns], without weights; ``select_topk`` in (0, 1]: the share kept of the entries
    whose variance is not zero, ``int(select_topk·count)`` of them, equal variances in index order, 1 = all. A vote of
    zero elects +. The strongest delta dominates: η goes with the square of the norm.

    Equals mergekit's, but for small deltas: where the η_i before division sum to less than 1e-6 (an rms of 7e-4 for
    two, as adapters often have) mergekit takes equal weights, and it divides by at least 1e-6. PEFT has none. Raises
    UsageError for weights, for a select_topk outside (0, 1], and below 1 for a single adapter, which has no variance.

    Source: Wan et al., FuseChat (arXiv 2408.07990).
    """
    no_weights("sce", weights)
    if not 0 < select_topk <= 1:
        raise UsageError(f"select_topk must be in (0, 1], not {select_topk}", hint="it is the share of entries that is kept")
    if len(deltas) == 1 and select_topk < 1:
        raise UsageError("sce selects by the variance between adapters: it needs two", hint="set select_topk=1")
    select = _selection(_Variance(deltas), select_topk)

    def energies(tiles: list[torch.Tensor], start: int) -> list[torch.Tensor]:
        return [part.double().square() for part in _selected(tiles, start, select)]

    sums = totals(deltas, energies)
    energy = math.fsum(sums)
    shares = [each / energy for each in sums] if energy else [1 / len(deltas)] * len(deltas)

    def combine(parts: list[torch.Tensor], start: int) -> torch.Tensor:
        parts = _selected(parts, start, select)
        up = weighted_sum(parts, [1.0] * len(parts)) >= 0
        out, share = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
        for part, weight in zip(parts, shares, strict=True):
            agree = (((part > 0) == up) & (part != 0)).to(part.dtype) * weight
            out += part * agree
            share += agree
        return out / (share + (share == 0))

    return Plan([keep] * len(deltas), combine)


@dataclass(frozen=True)
class _Variance:
    """The variance over the adapters, as tiles of float64."""

    deltas: Sequence[Tiled]
    key: str = ""

    @property
    def rows(self) -> int:
        return self.deltas[0].rows

    @property
    def columns(self) -> int:
        return self.deltas[0].columns

    @property
    def step(self) -> int:
        return self.deltas[0].step

    def tile(self, start: int, stop: int) -> torch.Tensor:
        return _variance([delta.tile(start, stop) for delta in self.deltas])


def _variance(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    wide = [tile.double() for tile in tiles]
    mean = weighted_sum(wide, [1.0] * len(wide)) / len(wide)
    return weighted_sum([(tile - mean).square() for tile in wide], [1.0] * len(wide)) / len(wide)


def _selection(variance: Tiled, share: float) -> Trim | None:
    """Which variances are kept; None for all."""
    if share >= 1:
        return None
    count = int(share * total(variance, lambda tile, start: (tile > 0).double()))
    return top(variance, count) if count else Trim(math.inf)


def _selected(tiles: Sequence[torch.Tensor], start: int, select: Trim | None) -> list[torch.Tensor]:
    if select is None:
        return list(tiles)
    mask = select.mask(_variance(tiles), start)
    return [tile * mask for tile in tiles]
