"""Gini, quantiles of energy, thresholds, empty rows, ranks and the base's rounding, against dense float64 references."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AdapterFactory
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report_sparsity import CASES, Source, gaussian, moments_of

from paft.report.histogram import Bounded, Histogram, table
from paft.report.moments import Moments
from paft.report.reference import GAUSSIAN, LAPLACE, random_ranks
from paft.report.scan import Scan, plain, scan
from paft.report.sources import from_factors, open_source
from paft.report.sparsity import sparsity
from paft.report.spectrum import of_factors, spectrum

DRAWS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "gaussian": lambda random: random.standard_normal(3000),
    "laplace": lambda random: random.laplace(size=3000),
    "sparse": lambda random: random.standard_normal(3000) * (random.random(3000) < 0.03),
    "three values": lambda random: random.choice([0.0, 1.0, 1.015], 3000),
    "equal": lambda random: np.full(100, 0.3),
    "one": lambda random: np.array([5.0]),
    "one of many": lambda random: np.eye(1, 500, 7)[0] * 1e-30,
    "sixty decades": lambda random: 10.0 ** random.uniform(-30, 30, 3000),
    "zero": lambda random: np.zeros(40),
}


def histogram(values: np.ndarray) -> Histogram:
    full = table()
    block = values.reshape(1, -1)
    plain(block, 1.0, 1.0, full, np.zeros(1, bool), np.zeros(values.size, bool), np.zeros(3, np.int64))
    return Histogram.of(values.size, full)


def gini(values: np.ndarray) -> float:
    size = np.sort(np.abs(values))
    n = len(size)
    return float((2 * np.arange(1, n + 1) - n - 1) @ size / (n * size.sum()))


def holding(values: np.ndarray, share: float) -> float:
    square = np.sort(values**2)[::-1]
    return (int(np.searchsorted(np.cumsum(square), share * square.sum() * (1 - 1e-15))) + 1) / len(values)


def within(found: Bounded | None, exact: float, slack: float = 1e-12) -> None:
    assert found is not None
    assert abs(found.value - exact) <= found.bound + slack


@pytest.mark.parametrize("name", DRAWS)
def test_every_bound_holds(name: str) -> None:
    values = DRAWS[name](np.random.default_rng(1))
    found, size = histogram(values), np.abs(values)
    assert found.l1 == pytest.approx(size.sum(), rel=1e-12)
    assert found.sumsq == pytest.approx((size**2).sum(), rel=1e-12)
    for threshold in (*np.logspace(-32, 31, 40), 0.3, 1.0, 1.015):
        within(found.share_below(threshold), float((size < threshold).mean()))
        if size.any():
            within(found.energy_below(threshold), float((size[size < threshold] ** 2).sum() / (size**2).sum()))
    if not size.any():
        assert found.gini is None and found.holding(0.9) is None
        return
    within(found.gini, gini(values))
    for share in (0.5, 0.9, 0.99):
        within(found.holding(share), holding(values, share), slack=1.0001 / len(values))


def test_the_bounds_are_narrow() -> None:
    """With a million Gaussian entries: Gini to 1e-4, d90 and d99 to 1e-3, a share to 0.3 %."""
    found = histogram(np.random.default_rng(0).standard_normal(1_000_000))
    assert found.gini and found.gini.bound < 1e-4
    for share in (0.9, 0.99):
        d = found.holding(share)
        assert d and d.bound < 1e-3
    assert max(found.share_below(t).bound for t in np.logspace(-3, 1, 50)) < 0.008


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40))
def test_adding_histograms_is_adding_entries(seed: int, first: int, second: int) -> None:
    random = np.random.default_rng(seed)
    one, two = (random.standard_normal(n) * 10.0 ** random.integers(-20, 20) * (random.random(n) < 0.7) for n in (first, second))
    both, whole = histogram(one) + histogram(two), histogram(np.concatenate([one, two]))
    assert (both.entries, both.first) == (whole.entries, whole.first)
    np.testing.assert_allclose(both.bins, whole.bins, rtol=1e-12)


@pytest.mark.parametrize("law, draw", [(GAUSSIAN, "standard_normal"), (LAPLACE, "laplace")])
def test_the_references_are_those_of_large_draws(law: object, draw: str) -> None:
    values = getattr(np.random.default_rng(0), draw)(size=1 << 20)
    found = histogram(values)
    n_eff = found.l1**2 / (found.sumsq * found.entries)
    d90, d99 = found.holding(0.9), found.holding(0.99)
    assert d90 and d99 and found.gini
    measured = {"n_eff": n_eff, "hoyer": 1 - math.sqrt(n_eff), "gini": found.gini.value, "d90": d90.value, "d99": d99.value}
    for key, value in measured.items():
        assert value == pytest.approx(getattr(law, key), abs=4e-3)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 31, 1024, 1500])
def test_the_compiled_pass_equals_the_plain_one_bit_for_bit(kind: type, width: int) -> None:
    from paft.report.kernels import add_block

    random = np.random.default_rng(width)
    block = (random.standard_normal((9, width)) * 10.0 ** random.uniform(-20, 20, (9, width))).astype(kind)
    block[3] = 0
    block[:, ::7] = 0
    made = []
    for add in (plain, add_block):
        found, counts = Scan(9, width), np.zeros(3, np.int64)
        largest = add(block, 0.3, 0.1, found.table, found.row_used, found.column_used, counts)
        made.append((largest, counts, found.table, found.row_used, found.column_used))
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_large_tensor_takes_the_compiled_pass_and_finds_the_same() -> None:
    values = np.random.default_rng(0).standard_normal((300, 500))
    fused = scan(300, 500, [(0, 0, values[:, :200]), (0, 200, values[:, 200:])], 2.0, 0.1)
    assert fused.below_scaled == (np.abs(2 * values) < 0.1).sum()
    np.testing.assert_allclose(fused.histogram.bins, histogram(2 * values.ravel()).bins, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_measures_of_a_module(case: str) -> None:
    factors = CASES[case]()
    delta = (factors.scale * (factors.B.double() @ factors.A.double())).numpy()
    found: Moments = moments_of(factors)
    assert (found.rows, found.columns) == delta.shape
    plain_delta = (factors.B.double() @ factors.A.double()).numpy()
    assert found.zero_rows == (plain_delta == 0).all(axis=1).sum()
    assert found.zero_columns == (plain_delta == 0).all(axis=0).sum()
    if not delta.any():
        return
    within(found.gini, gini(delta.ravel()))
    within(found.d90, holding(delta.ravel(), 0.9), slack=1.0001 / delta.size)
    within(found.d99, holding(delta.ravel(), 0.99), slack=1.0001 / delta.size)


@pytest.mark.parametrize("case", CASES)
def test_the_spectrum_is_the_dense_svd(case: str) -> None:
    factors = CASES[case]()
    part = from_factors(Source("a", {"layers.0.q": factors})).parts[0]
    found = spectrum(part)
    assert found is not None
    assert found.dead == sum(not (factors.A[k].any() and factors.B[:, k].any()) for k in range(factors.A.shape[0]))
    exact = np.linalg.svd((factors.scale * (factors.B.double() @ factors.A.double())).numpy(), compute_uv=False)
    if not exact[0]:
        assert found.spectral == found.stable == found.effective == 0
        return
    rank = min(len(exact), len(found.values))
    np.testing.assert_allclose(found.values[:rank], exact[:rank], atol=2e-8 * exact[0])
    assert found.frobenius == pytest.approx(float(np.linalg.norm(exact)), rel=1e-10)
    assert found.stable == pytest.approx(float((exact**2).sum() / exact[0] ** 2), rel=1e-10)
    shares = exact[exact > 0] / exact.sum()
    assert found.effective == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-5)


def test_dead_ranks() -> None:
    dense = gaussian(r=6)
    dense.A[2], dense.B[:, 4] = 0, 0
    found = of_factors((dense.B.double(), dense.A.double()), 1.0)
    assert (found.rank, found.dead, sum(value > 1e-6 * found.spectral for value in found.values)) == (6, 2, 4)


def test_ranks_of_random_deltas_are_as_told() -> None:
    """The drawn reference is near another draw, and a large matrix follows a small one of its proportions."""
    found = of_factors((torch.randn(400, 16, dtype=torch.float64), torch.randn(16, 300, dtype=torch.float64)), 1.0)
    assert (found.stable, found.effective) == pytest.approx(random_ranks(400, 300, 16), rel=0.15)
    stable, effective = random_ranks(600, 900, None)
    drawn = np.linalg.svd(np.random.default_rng(5).standard_normal((600, 900)), compute_uv=False)
    assert stable == pytest.approx(float((drawn**2).sum() / drawn[0] ** 2), rel=0.1)
    p = drawn / drawn.sum()
    assert effective == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=0.02)


@pytest.mark.parametrize("rms", [1e-7, 2e-5, 1e-2])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_what_rounding_leaves(tiny_base: Path, tmp_path: Path, make_adapter: AdapterFactory, rms: float,
                              kind: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    from paft.adapter import read_adapter

    base = tmp_path / "base"
    base.mkdir()
    weights = {name: tensor.to(kind) for name, tensor in load_file(tiny_base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    path = make_adapter(tiny_base, 3)
    file = path / "adapter_model.safetensors"
    save_file({name: tensor * rms ** 0.5 * 10 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    report = sparsity(open_source(str(path), str(base)))
    for tensor in report.tensors:
        weight = weights[tensor.name + ".weight"]
        factors = read_adapter(path).factors[tensor.name]
        delta = (factors.B * factors.scale) @ factors.A
        landed = (weight.float() + delta).to(kind) != weight
        assert tensor.moments.invisible == pytest.approx(1 - float(landed.double().mean()))
        assert tensor.moments.relative == pytest.approx(float(delta.double().norm() / weight.double().norm()), rel=1e-5)
        energy = float(delta[landed].double().square().sum() / delta.double().square().sum())
        assert tensor.moments.landed == pytest.approx(energy, rel=1e-5)


def test_a_threshold_matched_in_magnitude() -> None:
    """Two scales of one update have the same share once one is rescaled to the other's rms."""
    one, other = (sparsity(Source(str(rms), {"layers.0.q": gaussian(rms=rms)})) for rms in (1e-6, 1e-4))
    assert one.overall.moments.share_scaled - other.overall.moments.share_scaled > 0.8
    delta = (2 * gaussian(rms=1e-6).B.double() @ gaussian(rms=1e-6).A.double()).abs()
    factor = other.overall.moments.rms / one.overall.moments.rms
    within(one.matched(other.overall.moments.rms), float((delta * factor < 1e-5).double().mean()))
    within(one.matched(one.overall.moments.rms), one.overall.moments.share_scaled)
    for threshold, found in one.sweep.items():
        within(found, float((delta < threshold).double().mean()))


