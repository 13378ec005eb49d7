"""Stochastic rounding: always a neighbour, right on average, the same bits for any tile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import AdapterFactory
from safetensors.torch import load_file

from paft.cli import invoke
from paft.merge.engine import merge
from paft.merge.stochastic import Rounding

TYPES = [torch.bfloat16, torch.float16]


def values(dtype: torch.dtype) -> torch.Tensor:
    """Sizes from subnormal to near the largest, of both signs, and values that the type holds exactly."""
    generator = torch.Generator().manual_seed(0)
    tiny, large = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 4
    scale = torch.logspace(float(torch.tensor(tiny / 8).log10()), float(torch.tensor(large).log10()), 40, dtype=torch.float64)
    mixed = (torch.randn(40, 25, generator=generator).double() * scale[:, None]).clamp(-large, large).float()
    return torch.cat([mixed, mixed.to(dtype).float(), torch.zeros(1, 25), -torch.zeros(1, 25)])


@pytest.mark.parametrize("dtype", TYPES)
def test_each_value_goes_to_a_neighbour_and_the_mean_is_right(dtype: torch.dtype) -> None:
    value, count = values(dtype), 600
    drawn = torch.stack([Rounding(seed, "w")(value, dtype, 0).double() for seed in range(count)])
    low, high = drawn.min(0).values, drawn.max(0).values
    near = value.to(dtype).double()
    exact = near == value.double()
    assert torch.equal(low[exact], near[exact]) and torch.equal(high[exact], near[exact])
    assert bool(((low <= value) & (value <= high) | (low == high)).all())
    assert bool(((near == low) | (near == high)).all())
    gap = high - low
    error = (drawn.mean(0) - value.double()).abs()
    chance = ((value.double() - low) / gap.clamp(min=1e-300)).clamp(0, 1)
    spread = (chance * (1 - chance) / count).sqrt() * gap
    seen = gap > 0
    assert bool((error[seen] <= 6 * spread[seen] + 0.02 * gap[seen]).all())
    assert int(seen.sum()) > 900


def test_the_sign_of_zero_stays() -> None:
    zeros = torch.tensor([[0.0, -0.0]])
    assert torch.equal(Rounding(0, "w")(zeros, torch.bfloat16, 0).view(torch.int16), zeros.bfloat16().view(torch.int16))


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_are_rounded_alike_wherever_a_tile_begins(dtype: torch.dtype) -> None:
    value, rounding = values(dtype), Rounding(3, "w")
    whole = rounding(value, dtype, 0)
    parts = torch.cat([rounding(value[a : a + 7], dtype, a) for a in range(0, len(value), 7)])
    assert torch.equal(parts, whole)
    assert not torch.equal(Rounding(4, "w")(value, dtype, 0), whole)
    assert not torch.equal(Rounding(3, "v")(value, dtype, 0), whole)


def test_a_delta_below_the_last_place_survives_on_average(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    """Over many seeds the merged model has the delta that rounding to nearest loses."""
    adapter, name = str(make_adapter(tiny_base, 1)), "model.layers.0.mlp.up_proj.weight"
    common = {"base": None, "method": "task_arithmetic", "parameters": {}}
    merge([adapter], out=tmp_path / "exact", weights=[1e-3], **common)
    merge([adapter], out=tmp_path / "base", weights=[0.0], dtype="bfloat16", **common)
    wanted = load_file(tmp_path / "exact" / "model.safetensors")[name].double()
    start = load_file(tmp_path / "base" / "model.safetensors")[name].double()
    merge([adapter], out=tmp_path / "near", weights=[1e-3], dtype="bfloat16", **common)
    found = []
    for seed in range(60):
        out = tmp_path / f"{seed}"
        merge([adapter], out=out, weights=[1e-3], dtype="bfloat16", rounding="stochastic", seed=seed, **common)
        found.append(load_file(out / "model.safetensors")[name].double())
    mean = torch.stack(found).mean(0)
    near = load_file(tmp_path / "near" / "model.safetensors")[name].double()
    assert float((mean - wanted).norm()) < 0.25 * float((near - wanted).norm())
    assert not torch.equal(start, found[0])


def test_threads_and_tiles_change_no_byte_of_it(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    adapter, bytes_ = str(make_adapter(tiny_base, 1)), set()
    for threads, elements in ((1, 1 << 18), (3, 100)):
        out = tmp_path / f"{threads}"
        merge([adapter], base=None, method="linear", parameters={}, weights=None, out=out, dtype="float16", threads=threads,
              rounding="stochastic", tile_elements=elements)
        bytes_.add((out / "model.safetensors").read_bytes())
    assert len(bytes_) == 1


def test_an_adapter_is_not_rounded(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    arguments = ["merge", str(make_adapter(tiny_base, 1)), "--method", "linear", "--rounding", "stochastic"]
    assert invoke([*arguments, "--output-kind", "lora", "-o", str(tmp_path / "out")]) == 2
    assert invoke([*arguments, "-o", str(tmp_path / "out")]) == 0
