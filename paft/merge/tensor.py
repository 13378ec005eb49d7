"""One tensor: its deltas through a plan, added to the base and rounded once, tile by tile.

    W' = round(W + D),   D = plan(ΔW_1, ..., ΔW_n)

The plain form is torch; the fused form (`kernels`) gives the same bytes for large bfloat16 and float32 tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from paft.checkpoint import FLOATS, Checkpoint, Entry
from paft.delta import Tiled, fill, tile_rows
from paft.errors import MismatchError
from paft.merge.device import making
from paft.merge.ops import Plan
from paft.merge.select import FUSED_FROM
from paft.merge.stochastic import Rounding
from paft.merge.tally import Tally

Read = Callable[[int, int], torch.Tensor]


def merged_tiles(entry: Entry, tensors: Sequence[Tiled], plan: Plan, read: Read, dtype: torch.dtype, tally: Tally,
                 elements: int, rounding: Rounding | None = None, device: str = "cpu") -> Iterator[torch.Tensor]:
    """The merged row tiles of one tensor in ``dtype``; a tile lives until the next one is asked for.

    ``rounding`` None is to nearest. ``device`` is where the deltas are; the tiles come back to the CPU.

    ``read(start, stop)`` gives rows of the base, once each, in order. Raises MismatchError when a value does not fit, or
    when the base holds NaN or infinity there.
    """
    step = tile_rows(entry.columns, elements)
    spans = [(start, min(start + step, entry.rows)) for start in range(0, entry.rows, step)]
    fused = None if rounding or device != "cpu" else _fused(entry, tensors, plan, dtype, tally, step)
    one = fused or _plain(tensors, plan, dtype, tally, rounding)
    for start, stop in spans:
        weight = read(start, stop)
        with making(device):
            out = one(start, stop, weight.to(device))
        if out is None:
            raise _not_finite(entry, dtype, start, stop)
        yield out.cpu()
    tally.close()


def _not_finite(entry: Entry, dtype: torch.dtype, start: int, stop: int) -> MismatchError:
    """Whose fault it is that rows of the result hold NaN or infinity: the base's, the type's or the deltas'."""
    base = Checkpoint(entry.file.parent, (entry.file,), {entry.name: entry}, {})
    if not torch.isfinite(base.tile(entry.name, start, stop)).all():
        return MismatchError(f"the base's {entry.name} holds NaN or infinity", hint="copy or download the base again")
    narrow = dtype == torch.float16
    hint = "pass --dtype bfloat16, or float32" if narrow else "the delta is too large: a training diverged, or a weight is wrong"
    return MismatchError(f"{entry.name} does not fit into {str(dtype).removeprefix('torch.')} after merging", hint=hint)


_Tile = Callable[[int, int, torch.Tensor], torch.Tensor | None]


def _plain(tensors: Sequence[Tiled], plan: Plan, dtype: torch.dtype, tally: Tally, rounding: Rounding | None) -> _Tile:
    def tile(start: int, stop: int, weight: torch.Tensor) -> torch.Tensor | None:
        tiles = [tensor.tile(start, stop) for tensor in tensors]
        parts = [keep(each, start) for keep, each in zip(plan.filters, tiles, strict=True)]
        delta = plan.combine(parts, start)
        wide = weight if weight.dtype == torch.float64 else weight.float()
        out = rounding(wide + delta, dtype, start) if rounding else (wide + delta).to(dtype)
        zero = weight == 0
        if zero.any():  # W + 0 is W, byte for byte, but for the sign of -0.0
            out = torch.where(zero & (delta == 0), weight.to(dtype), out)
        if not torch.isfinite(out).all():
            return None
        tally.filtered(tiles, parts)
        tally.rounded(delta, out.to(wide.dtype) - wide)
        return out

    return tile


def _fused(entry: Entry, tensors: Sequence[Tiled], plan: Plan, dtype: torch.dtype, tally: Tally, step: int) -> _Tile | None:
    base = FLOATS[entry.dtype]
    if base != dtype or base not in (torch.bfloat16, torch.float32) or entry.rows * entry.columns < FUSED_FROM:
        return None
    from paft.merge import kernels

    fused = kernels.fuse(plan)
    if fused is None:
        return None
    count = len(tensors)
    stack = torch.empty(count + 1, min(step, entry.rows), entry.columns)  # the deltas, and their merge
    counts = kernels.counters(count)

    def tile(start: int, stop: int, weight: torch.Tensor) -> torch.Tensor | None:
        rows = stack[:, : stop - start]
        for place, tensor in zip(rows[:count], tensors, strict=True):
            fill(place, tensor, start, stop)
        counts[:] = 0
        sums = fused(rows[:count].numpy(), start, rows[count].numpy(), _numpy(weight), counts)
        if sums is None:
            return None
        tally.counted(weight.numel(), counts.tolist(), sums.T.tolist())
        return weight

    return tile


def _numpy(weight: torch.Tensor):  # numpy knows no bfloat16
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()
