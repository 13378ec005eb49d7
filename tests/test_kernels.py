"""The fused kernels and the one-pass selection give the bits of the plain forms, whatever the plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paft.checkpoint import Entry
from paft.delta import BLOCK, ProductTensor, Tiled
from paft.merge import merged, select, tensor
from paft.merge.consensus import Consensus
from paft.merge.drop import Drop
from paft.merge.methods import bind, resolve
from paft.merge.ops import DIALECTS, DenseTensor, Plan, WeightedSum, keep
from paft.merge.tally import Tally
from paft.merge.trim import Trim

ROWS, COLUMNS = 150, 1100  # more than one chunk of columns, and no multiple of a block of rows
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def products(count: int, seed: int = 0) -> list[Tiled]:
    generator = torch.Generator().manual_seed(seed)
    left = [torch.randn(ROWS, 4, generator=generator) for _ in range(count)]
    right = [torch.randn(4, COLUMNS, generator=generator) for _ in range(count)]
    for each in left:
        each[::7] = 0  # rows without a change
    return [ProductTensor(a * 1e-3, b, BLOCK, f"{i}") for i, (a, b) in enumerate(zip(left, right, strict=True))]


def base(dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(9)).mul_(0.02).to(dtype)
    weight[:, ::11] = 0.0
    weight[:, 1::11] = -0.0
    return weight


def run(deltas: list[Tiled], plan: Plan, weight: torch.Tensor, *, elements: int = BLOCK * COLUMNS,
        file: Path = Path("w")) -> tuple[torch.Tensor, Tally]:
    entry = Entry("w", file, NAMES[weight.dtype], tuple(weight.shape), 0, weight.nbytes)
    tally, source = Tally([str(i) for i in range(len(deltas))]), weight.clone()
    tiles = tensor.merged_tiles(entry, deltas, plan, lambda a, b: source[a:b], weight.dtype, tally, elements)
    return torch.cat([tile.clone() for tile in tiles]), tally


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


CASES: list[tuple[str, int, dict[str, Any], str]] = [
    ("ties", 2, {"density": 0.5}, "mergekit"), ("ties", 2, {"density": 0.2}, "paper"), ("ties", 3, {"density": 0.3}, "peft"),
    ("ties", 2, {"density": 0.5, "normalize": False, "lambda": 0.7}, "mergekit"), ("ties", 1, {"density": 0.1}, "mergekit"),
    ("task_arithmetic", 2, {}, "mergekit"), ("linear", 3, {}, "mergekit"), ("slerp", 2, {"t": 0.3}, "mergekit"),
    ("dare_linear", 2, {"density": 0.3}, "mergekit"), ("dare_ties", 3, {"density": 0.4}, "peft"),
    ("magnitude_prune", 2, {"density": 0.15}, "mergekit"),
]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tensor, "FUSED_FROM", 0)
    yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("method", "count", "parameters", "dialect"), CASES, ids=lambda value: str(value))
def test_a_fused_merge_has_the_bytes_of_the_plain_one(method: str, count: int, parameters: dict[str, Any], dialect: str,
                                                      dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, weight = products(count), base(dtype)
    function = bind(method, resolve(method, parameters, dialect), dialect=dialect, seed=3)
    plan = function(deltas, [1.0, 0.6, -0.3][:count] if method == "task_arithmetic" else [1.0, 0.6, 0.3][:count]
                    if method != "slerp" else [1.0, 1.0])
    monkeypatch.setattr(tensor, "FUSED_FROM", 1 << 60)
    plain, said = run(deltas, plan, weight)
    monkeypatch.setattr(tensor, "FUSED_FROM", 0)
    found, told = run(deltas, plan, weight)
    assert torch.equal(bits(found), bits(plain))
    assert not torch.equal(bits(found), bits(weight))
    assert (told.entries, told.before, told.after, told.conflicts, told.nonzero, told.survived) == (
        said.entries, said.before, said.after, said.conflicts, said.nonzero, said.survived)
    for mine, theirs in zip(told.squares, said.squares, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


@pytest.mark.parametrize(("method", "count", "parameters", "dialect"), CASES, ids=lambda value: str(value))
def test_the_merged_delta_alone_has_the_same_bits(method: str, count: int, parameters: dict[str, Any], dialect: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = products(count)
    plan = bind(method, resolve(method, parameters, dialect), dialect=dialect, seed=3)(deltas, [1.0] * count)
    monkeypatch.setattr(merged, "FUSED_FROM", 0)
    found = merged.Merged(deltas, plan)
    for start, stop in ((0, 64), (64, 100), (100, ROWS)):
        assert torch.equal(bits(found.tile(start, stop)), bits(plan([delta.tile(start, stop) for delta in deltas], start)))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("elements", [COLUMNS * 3, COLUMNS * BLOCK * 2, 1 << 30])
def test_tiles_of_another_size_change_no_byte_and_no_count(elements: int) -> None:
    deltas, weight = products(2), base(torch.bfloat16)
    plan = bind("ties", resolve("ties", {"density": 0.5}), dialect="mergekit")(deltas, [1.0, 0.7])
    reference, said = run(deltas, plan, weight)
    found, told = run(deltas, plan, weight, elements=elements)
    assert torch.equal(bits(found), bits(reference))
    assert told.report() == said.report()


@pytest.mark.usefixtures("fused")
def test_the_cut_among_equal_magnitudes_is_kept_in_any_row_and_chunk() -> None:
    """All magnitudes equal: the filter is its index alone."""
    sign = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).sign()
    delta, weight = DenseTensor(sign), torch.zeros(ROWS, COLUMNS)
    for last in (0, 5, 1023, 1024, COLUMNS - 1, COLUMNS, 70 * COLUMNS + 1060, ROWS * COLUMNS - 1):
        found, _ = run([delta], Plan([Trim(1.0, last)], WeightedSum((1.0,))), weight)
        assert int((found != 0).sum()) == last + 1
        assert bool((found.flatten()[: last + 1] != 0).all())


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_overflow_is_seen(dtype: torch.dtype, tmp_path: Path) -> None:
    from paft.errors import MismatchError

    delta = torch.zeros(ROWS, COLUMNS)
    delta[77, 1050] = torch.finfo(dtype).max
    file = stored(base(dtype), tmp_path)
    with pytest.raises(MismatchError, match=r"^w does not fit into (bfloat16|float32) after merging"):
        run([DenseTensor(delta)], Plan([keep], WeightedSum((3.0,))), base(dtype), file=file)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 1050, COLUMNS - 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_that_is_not_finite_is_blamed_itself(dtype: torch.dtype, column: int, bad: float, tmp_path: Path) -> None:
    from paft.errors import MismatchError

    weight = base(dtype)
    weight[77, column] = bad
    for scale in (1.0, 0.0):
        with pytest.raises(MismatchError, match="the base's w holds NaN or infinity"):
            run(products(1), Plan([keep], WeightedSum((scale,))), weight, file=stored(weight, tmp_path))


def stored(weight: torch.Tensor, folder: Path) -> Path:
    """A file that begins with the bytes of a tensor."""
    (folder / "w").write_bytes(weight.view(torch.uint8).numpy().tobytes())
    return folder / "w"


@pytest.mark.usefixtures("fused")
def test_bfloat16_rounds_to_the_nearest_even_value() -> None:
    """Every halfway case between bfloat16 neighbours of both signs, and their neighbours in float32."""
    grid = torch.arange(0x3F80, 0x4080, dtype=torch.int32)
    halves = torch.stack([((grid << 16) + 0x8000 + step).view(torch.float32) for step in (-1, 0, 1)]).flatten()
    delta = torch.cat([halves, -halves])[None].repeat(ROWS, 1)
    found, _ = run([DenseTensor(delta)], Plan([keep], WeightedSum((1.0,))), torch.zeros(delta.shape, dtype=torch.bfloat16))
    assert torch.equal(bits(found), bits(delta.bfloat16()))


def test_what_has_no_fused_form_is_left_to_torch() -> None:
    from paft.merge.kernels import fuse

    assert fuse(Plan([lambda tile, start: tile], WeightedSum((1.0,)))) is None
    assert fuse(Plan([keep], lambda parts, start: parts[0])) is None
    assert fuse(Plan([keep, Drop(1, 0.5)], Consensus([1.0, 1.0], DIALECTS["paper"], True, 1.0, False))) is not None


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["product", "sparse", "few values", "steps"])
def test_selection_in_one_pass_is_that_by_histogram(kind: str, share: float) -> None:
    generator = torch.Generator().manual_seed(4)
    if kind == "product":
        delta: Tiled = products(1)[0]
    else:
        data = torch.randn(ROWS, COLUMNS, generator=generator)
        if kind == "sparse":
            data *= torch.rand(data.shape, generator=generator) < 0.05
        elif kind == "few values":
            data = data.round()
        else:
            data *= torch.arange(ROWS)[:, None].float().exp2().clamp(max=1e20)  # one row outweighs all before it
        delta = DenseTensor(data, step=BLOCK)
    count = max(1, int(share * ROWS * COLUMNS))
    expected = select.by_histogram(delta, count)
    for found in (select.between(delta, count), select.select(delta, count)):
        if found is not None:
            assert (found.value, found.above) == (expected.value, expected.above)
            assert torch.equal(found.places, expected.places)
    magnitudes = torch.cat([delta.tile(a, min(a + 1, ROWS)).flatten() for a in range(ROWS)]).abs().sort(descending=True).values
    assert expected.value == float(magnitudes[count - 1])


def test_without_a_writable_cache_kernels_are_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from paft.merge import jit

    real, asked = jit.numba.njit, []

    def njit(function: Any, **options: Any) -> Any:
        asked.append(options.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return real(function, **options)

    monkeypatch.setattr(jit.numba, "njit", njit)
    assert jit.jit(lambda x: x + 1)(2) == 3
    assert asked == [True, False]
