"""Every method against every law; `methodkit` names who is excused from what, and why."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methodkit import (
    AT_LEAST_TWO,
    CASES,
    EXACTLY_TWO,
    LAWS,
    LINEAR,
    MEANS,
    PLAIN,
    RANDOM,
    UNWEIGHTED,
    Case,
    deltas,
    dense,
    loras,
    seeds,
    sizes,
)  # fmt: skip

from paft.errors import UsageError
from paft.merge import methods
from paft.merge.ops import DenseTensor

every_case = pytest.mark.parametrize("case", CASES, ids=str)
quick = settings(deadline=None, max_examples=6, derandomize=True)


def held_by(law: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if law not in case.excused], ids=str)


def test_the_table_has_every_method_and_knows_its_laws() -> None:
    assert {case.name for case in CASES} == set(methods.names())
    assert {law for case in CASES for law in case.excused} == LAWS
    assert all(case.dialect for case in CASES if methods.describe(case.name)["dialects"])


@every_case
@quick
@given(seeds, sizes, sizes)
def test_identity(case: Case, seed: int, rows: int, columns: int) -> None:
    """One adapter, weight 1, nothing dropped: the delta itself, bit for bit. Two that are the same: as near as can be."""
    plain = Case(case.name, {**PLAIN.get(case.name, {}), **case.dialect})
    delta = deltas(seed, rows, columns)[0].float()
    if case.name not in AT_LEAST_TWO:
        assert torch.equal(plain.run([delta]), delta)
    if case.name in MEANS | AT_LEAST_TWO:
        assert torch.allclose(plain.run([delta, delta]), delta, rtol=1e-6, atol=0)


@every_case
def test_no_strength_is_no_change(case: Case) -> None:
    if case.name in MEANS | UNWEIGHTED:
        with pytest.raises(UsageError, match=r"sum to zero|no weights"):
            case.run(deltas(0), [0.0, 0.0])
    else:
        assert not case.run(deltas(0), [0.0, 0.0]).any()


@held_by("silent")
@quick
@given(seeds, sizes, sizes, st.booleans())
def test_weight_zero_is_absence(case: Case, seed: int, rows: int, columns: int, first: bool) -> None:
    pair = [DenseTensor(delta, key) for delta, key in zip(deltas(seed, rows, columns), "ab", strict=True)]
    place = 0 if first else 1
    got = case.merge(pair, [1.0, 0.0] if first else [0.0, 1.0])
    alone = {key: value[place : place + 1] for key, value in case.parameters.items() if isinstance(value, list)}
    want = pair[place].data if case.name in EXACTLY_TWO else case.merge([pair[place]], **alone)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)


@every_case
@quick
@given(seeds, sizes, sizes)
def test_order_of_adapters(case: Case, seed: int, rows: int, columns: int) -> None:
    """Swapping adapters, with their weights, parameters and mask keys, changes nothing."""
    pair = [DenseTensor(delta, key) for delta, key in zip(deltas(seed, rows, columns), "ab", strict=True)]
    weights = [1.0, 1.0] if case.name in UNWEIGHTED or case.parameters.get("t") == 0.3 else [0.25, 0.5]
    swapped = {
        key: value[::-1] if isinstance(value, list) else 1 - value if value == 0.3 else value
        for key, value in case.parameters.items()
    }
    got = Case(case.name, swapped).merge(pair[::-1], weights[::-1])
    assert torch.allclose(got, case.merge(pair, weights), rtol=1e-9, atol=1e-15)


@held_by("scale")
@quick
@given(seeds, sizes, sizes, st.sampled_from([-1.0, 0.5, 3.0, 1e-9, 1e6]))
def test_scaling_the_deltas_scales_the_result(case: Case, seed: int, rows: int, columns: int, scale: float) -> None:
    pair = deltas(seed, rows, columns)
    merged = case.run(pair)
    assert torch.allclose(case.run([delta * scale for delta in pair]), merged * scale, rtol=1e-9, atol=1e-15 * abs(scale))


@pytest.mark.parametrize("case", [case for case in CASES if "scale" in case.excused], ids=str)
def test_absolute_thresholds_scale_along(case: Case) -> None:
    scaled = {key: value * 8 for key, value in case.parameters.items()}
    got = Case(case.name, scaled).run([delta * 8 for delta in deltas(0)])
    assert torch.equal(got, case.run(deltas(0)) * 8)
    assert not torch.equal(case.run([delta * 8 for delta in deltas(0)]), got)


@held_by("cancel")
@quick
@given(seeds, sizes, sizes)
def test_opposite_weights_cancel(case: Case, seed: int, rows: int, columns: int) -> None:
    delta = DenseTensor(deltas(seed, rows, columns)[0], "the same key, the same mask")
    parameters = {key: value[0] if isinstance(value, list) else value for key, value in case.parameters.items()}
    assert not Case(case.name, parameters).merge([delta, delta], [1.0, -1.0]).any()


@every_case
@quick
@given(seeds, sizes, sizes)
def test_gauge(case: Case, seed: int, rows: int, columns: int) -> None:
    """A → QA, B → BQᵀ is the same ΔW; in float64 no entry is near enough to a threshold to change sides."""
    pair = loras(seed, rows, columns)
    generator = torch.Generator().manual_seed(seed + 1)
    turned = []
    for each in pair:
        rank = each.left.shape[1]
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
        turned.append(type(each)(each.left @ turn.T, turn @ each.right, each.step, each.key))
    size = sum(float(dense(each).data.norm()) for each in pair)
    want = case.merge(pair)
    assert torch.allclose(case.merge(turned), want, rtol=1e-8, atol=1e-9 * size)
    assert torch.allclose(case.merge([dense(each) for each in pair]), want, rtol=1e-8, atol=1e-9 * size)


@every_case
@quick
@given(seeds, st.integers(1, 40), st.sampled_from([(37, 23), (1, 50), (130, 3)]))
def test_tiles_change_no_bit(case: Case, seed: int, step: int, shape: tuple[int, int]) -> None:
    pair = [delta.float() for delta in deltas(seed, *shape)]
    assert torch.equal(case.run(pair), case.run(pair, step=step))


@every_case
@quick
@given(seeds)
def test_float32_is_close_to_float64(case: Case, seed: int) -> None:
    narrow = [delta.float() for delta in deltas(seed)]
    want = case.run([delta.double() for delta in narrow])
    got = case.run(narrow)
    assert got.dtype == torch.float32
    assert float((got - want).norm()) < 1e-6 * sum(float(delta.norm()) for delta in narrow)


@every_case
def test_coefficients_say_who_is_a_lora(case: Case) -> None:
    """Where a plan names coefficients, the result is that sum; a method that is linear in the deltas names them."""
    pair = [DenseTensor(delta, str(i)) for i, delta in enumerate(deltas(0))]
    plan = methods.load(case.name)(pair, [1.0, 1.0], **case.parameters)
    assert (plan.coefficients is not None) == (case.name in LINEAR and "low rank" not in case.excused)
    if plan.coefficients is not None:
        a, b = plan.coefficients
        assert torch.allclose(case.run(deltas(0)), a * pair[0].data + b * pair[1].data, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in EXACTLY_TWO], ids=str)
def test_three_adapters_in_any_order(case: Case) -> None:
    parameters = {key: value[0] if isinstance(value, list) else value for key, value in case.parameters.items()}
    three = [DenseTensor(delta, str(i)) for i, delta in enumerate(deltas(0, count=3))]
    got = [Case(case.name, parameters).merge([three[i] for i in order]) for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2])]
    assert all(torch.allclose(each, got[0], rtol=1e-9, atol=1e-15) for each in got)
    assert got[0].any()


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_seed_and_key_move_the_masks(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    first, other = (case.run(deltas(0), seed=seed) for seed in (0, 1))
    assert not torch.equal(first, other)
    keyed = [case.merge([DenseTensor(delta, key) for delta in deltas(0)]) for key in "ab"]
    assert not torch.equal(*keyed)


def digest() -> str:
    """One hash over the merges of all cases, on tensors that torch shares out among threads: more than 32768 entries."""
    found = hashlib.sha256()
    for case in CASES:
        for rows, columns in ((37, 900), (1, 33_000)):
            found.update(case.run([delta.float() for delta in deltas(3, rows, columns)]).numpy().tobytes())
        found.update(case.merge(loras(3, 40, 30)).numpy().tobytes())
    return found.hexdigest()


def test_processes_and_threads_change_no_bit() -> None:
    code = "import torch; torch.set_num_threads(4); import test_method_laws as laws; print(laws.digest())"
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "4", "PYTHONPATH": str(tests)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tests.parent, env=environment, check=False
    )
    assert done.stdout.strip() == digest(), done.stderr
