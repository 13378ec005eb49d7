"""What can be tested of another device without one: no operation of a plan mixes devices, and its absence is one line.

Fake tensors carry a device and no data, and refuse an operation between two devices as a real GPU does.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from conftest import AdapterFactory
from methodkit import CASES, Case
from torch._subclasses.fake_tensor import FakeTensorMode

from paft.cli import invoke
from paft.delta import ProductTensor
from paft.merge import methods
from paft.merge.device import making, moved
from paft.merge.ops import DenseTensor
from paft.merge.stochastic import Rounding


def deltas(count: int) -> list[ProductTensor]:
    generator = torch.Generator().manual_seed(0)
    return [ProductTensor(torch.randn(12, 3, generator=generator), torch.randn(3, 10, generator=generator), 64, f"{i}")
            for i in range(count)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_stays_on_its_device(case: Case) -> None:
    base = DenseTensor(torch.randn(12, 10, generator=torch.Generator().manual_seed(5)))
    function = methods.load(case.name)
    takes = inspect.signature(function).parameters
    if case.parameters.get("nuslerp_flatten") is False or case.parameters.get("filter_wise"):
        pytest.skip("the plan holds tensors of the device on which it was made")
    plan = function(deltas(2), [1.0, 1.0], **case.parameters, **({"base": base} if "base" in takes else {}))
    if "base" in takes and case.parameters.get("space") == "weight":
        pytest.skip("reads the base's tiles, which a job moves")
    with FakeTensorMode(), making("cuda"):
        tiles = [torch.empty(12, 10) for _ in range(2)]
        out = plan(tiles, 3)
        rounded = Rounding(0, "w")(out, torch.bfloat16, 3)
    assert out.device.type == rounded.device.type == "cuda"


def test_tensors_move_by_their_factors_or_by_tiles() -> None:
    product, dense = deltas(1)[0], DenseTensor(torch.randn(12, 10), key="k")
    for tensor in (product, dense):
        there = moved(tensor, "meta")
        assert (there.rows, there.columns, there.step, there.key) == (tensor.rows, tensor.columns, tensor.step, tensor.key)
        assert there.tile(0, 5).shape == (5, 10)
        assert there.tile(0, 5).device.type == "meta"
        assert moved(tensor, "cpu") is tensor
    assert isinstance(moved(product, "meta"), ProductTensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path,
                            capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", str(make_adapter(tiny_base, 1)), "--device", "cuda", "-o", str(tmp_path / "out")]
    assert invoke(arguments) == 5
    told = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Loading")]
    assert len(told) == 2 and "CUDA" in told[0] and "--device" in told[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_what_is_no_whole_model_is_not_made_there(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, kind: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", str(make_adapter(tiny_base, 1)), "--device", "cuda", "--output-kind", kind, "-o", str(tmp_path / "out")]
    assert invoke(arguments) == 2
    assert "only a whole model" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "task_arithmetic"])
def test_a_gpu_gives_the_cpu_s_model_to_rounding(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path,
                                                     method: str) -> None:
    from safetensors.torch import load_file

    pair = [str(make_adapter(tiny_base, seed)) for seed in (1, 2)]
    for device in ("cpu", "cuda"):
        assert invoke(["merge", *pair, "--method", method, "--device", device, "-o", str(tmp_path / device)]) == 0
    here, there = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-5, atol=1e-6)
