"""Inner products of LoRAs from their factors: as exact as the dense ones, free of tiles and of a dense pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methodkit import LINEAR, dense, loras

from paft.delta import ProductTensor, ZeroTensor
from paft.merge import methods
from paft.merge.ops import DenseTensor, dot, gram


@dataclass(frozen=True)
class Unread(ProductTensor):
    """A product whose tiles nobody may ask for."""

    def tile(self, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("a dense pass")


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(1, 700), st.integers(1, 700), st.integers(1, 9), st.integers(1, 5), st.integers(0, 999), st.booleans(),
)  # fmt: skip
def test_dot_of_factors_is_the_dense_dot(rows: int, columns: int, left: int, right: int, seed: int, narrow: bool) -> None:
    pair = loras(seed, rows, columns, (left, right))
    if narrow:
        pair = [ProductTensor(each.left.float(), each.right.float(), 7, "") for each in pair]
    x, y = (each.left.double() @ each.right.double() for each in pair)
    size = float(x.norm() * y.norm())
    assert dot(*pair) == pytest.approx(float((x * y).sum()), rel=0, abs=1e-12 * size)
    assert dot(pair[0], pair[0]) == pytest.approx(float((x * x).sum()), rel=1e-12)
    assert dot(*pair) == pytest.approx(dot(*(dense(each) for each in pair)), rel=0, abs=1e-5 * size)


def test_steps_change_no_bit() -> None:
    first, second = loras(0, 300, 90)
    other = ProductTensor(first.left, first.right, 5, "another")
    assert dot(first, second) == dot(other, second)


def test_gram_of_anything() -> None:
    """LoRAs, plain tensors, zeros: one symmetric matrix, and one pass for what needs it."""
    plain = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    deltas = [*loras(0, 30, 20), DenseTensor(plain), ZeroTensor(30, 20, 8)]
    whole = [delta.tile(0, 30).double() for delta in deltas]
    found = gram(deltas)
    for i, left in enumerate(whole):
        for j, right in enumerate(whole):
            assert found[i][j] == found[j][i] == pytest.approx(float((left * right).sum()), rel=1e-12, abs=1e-12)
    assert found[3] == [0.0] * 4


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_a_method_that_is_linear_plans_without_a_dense_pass(name: str) -> None:
    unread = [Unread(each.left, each.right, each.step, each.key) for each in loras(0, 40, 30)]
    plan = methods.load(name)(unread, [1.0, 1.0])
    assert plan.coefficients is not None and any(plan.coefficients)


def test_beside_an_adapter_that_does_not_touch_the_tensor() -> None:
    lora = Unread(*(getattr(loras(0, 40, 30)[0], name) for name in ("left", "right", "step", "key")))
    for name in sorted(LINEAR - {"model_stock"}):
        plan = methods.load(name)([lora, ZeroTensor(40, 30, 8)], [1.0, 1.0])
        assert plan.coefficients is not None and plan.coefficients[0] > 0
