"""The tiled penalty against plain autograd in float64, and against PEFT's own dense deltas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from paft.train import l1
from paft.train.l1 import lora_factors, nonlinear_layers, penalty, product_half_square, product_l1

SHAPES = {"rows": st.integers(1, 17), "columns": st.integers(1, 17), "rank": st.integers(1, 5), "seed": st.integers(0, 99)}


def factors(rows: int, columns: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return A, B


def value_and_gradients(function: Any, A: Tensor, B: Tensor, weight: float = 1.0, autocast: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = function(A, B)
    return [value.detach(), *torch.autograd.grad(weight * value, (A, B))]


def dense_l1(A: Tensor, B: Tensor) -> Tensor:
    return (B @ A).abs().sum()


def dense_half_square(A: Tensor, B: Tensor) -> Tensor:
    return 0.5 * (B @ A).square().sum()


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("ours", "dense"), [(product_l1, dense_l1), (product_half_square, dense_half_square)])
@given(**SHAPES, weight=st.floats(-3, 3))
@settings(deadline=None, max_examples=40)
def test_value_and_gradient_are_autograds(
    ours: Any, dense: Any, rows: int, columns: int, rank: int, seed: int, weight: float
) -> None:
    A, B = factors(rows, columns, rank, seed)
    close(value_and_gradients(ours, A, B, weight), value_and_gradients(dense, A, B, weight), 1e-12)


@pytest.mark.parametrize("tile", [1, 7, 40, 100, 1000])
@pytest.mark.parametrize("layers", [1, 5])
def test_tiles_do_not_matter(tile: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles cut rows, large ones take several layers of one shape together."""
    monkeypatch.setattr(l1, "TILE", tile)
    for rows, columns in ((1, 9), (13, 9), (13, 1), (8, 50)):
        pairs = [factors(rows, columns, 3, seed) for seed in range(layers)]
        leaves = [pair[side] for side in (0, 1) for pair in pairs]
        weights = torch.arange(1.0, layers + 1, dtype=torch.float64)
        ours = l1._ProductL1.apply(*leaves) @ weights
        dense = sum(weight * dense_l1(*pair) for weight, pair in zip(weights, pairs, strict=True))
        close([ours.detach(), *torch.autograd.grad(ours, leaves)], [dense.detach(), *torch.autograd.grad(dense, leaves)], 1e-12)


@pytest.mark.parametrize(("ours", "dense"), [(product_l1, dense_l1), (product_half_square, dense_half_square)])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_factors_are_scored_in_float32(ours: Any, dense: Any, autocast: bool) -> None:
    A, B = factors(40, 30, 4, 0, torch.bfloat16)
    exact = value_and_gradients(dense, A.detach().double().requires_grad_(), B.detach().double().requires_grad_())
    found = value_and_gradients(ours, A, B, autocast=autocast)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    close(found[:1], exact[:1], 1e-5)
    # What remains in the gradients is one rounding to bfloat16 (and an entry near zero whose sign float32 may miss).
    close(found[1:], [t.bfloat16() for t in exact[1:]], 1e-2)


def test_autocast_does_not_reach_float32_factors() -> None:
    A, B = factors(40, 30, 4, 0, torch.float32)
    plain, cast = value_and_gradients(product_l1, A, B), value_and_gradients(product_l1, A, B, autocast=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_the_sign_of_zero_is_zero() -> None:
    """PEFT starts at B = 0: there the penalty must push nothing, in either factor."""
    A, B = factors(5, 6, 2, 0)
    with torch.no_grad():
        B.zero_()
    assert all(not t.any() for t in value_and_gradients(product_l1, A, B))


def test_nothing_is_kept_but_the_factors() -> None:
    A, B = factors(300, 200, 2, 0)
    saved: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor)
    with keep:
        product_l1(A, B)
    assert {tensor.data_ptr() for tensor in saved} == {A.data_ptr(), B.data_ptr()}
    with keep:
        product_half_square(A, B)
    assert max(tensor.numel() for tensor in saved) == B.numel()


def test_a_second_derivative_is_refused_not_wrong() -> None:
    A, B = factors(3, 3, 2, 0)
    gradient = torch.autograd.grad(product_l1(A, B) ** 2, A, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def peft_model(base: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # what PEFT starts at zero
            torch.nn.init.normal_(parameter, std=3e-4)
    return model


def conv1d_base() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "conv1d": {"fan_in_fan_out": True},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"q_proj": 9}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture(params=VARIANTS)
def adapted(request: pytest.FixtureRequest, tiny_base: Any) -> Any:
    base = conv1d_base() if request.param == "conv1d" else AutoModelForCausalLM.from_pretrained(tiny_base)
    return peft_model(base, **VARIANTS[request.param])


def dense_deltas(model: Any, adapter: str = "default") -> list[Tensor]:
    """PEFT's own s·B·A (for an embedding its transpose), by the layer's public method."""
    return [m.get_delta_weight(adapter).double() for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.scaling]


def test_penalty_is_the_sum_over_pefts_deltas(adapted: Any) -> None:
    deltas = [delta.detach() for delta in dense_deltas(adapted)]
    size = sum(delta.abs().sum() for delta in deltas)
    square = sum(delta.square().sum() for delta in deltas)
    value, norm = penalty(adapted, l1=0.3, l2=0.7)
    torch.testing.assert_close(norm.double(), size, rtol=1e-5, atol=0)
    torch.testing.assert_close(value.double(), 0.3 * size + 0.35 * square, rtol=1e-5, atol=0)
    assert penalty(adapted, l1=0, l2=1.0)[1].isnan()
    value.backward()
    touched = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    factors = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")  # DoRA's magnitudes are not in the product
    assert touched == {name for name, parameter in adapted.named_parameters() if any(factor in name for factor in factors)}


def test_value_and_gradient_of_a_whole_model_are_autograds_in_float64(adapted: Any) -> None:
    """The oracle differentiates PEFT's dense deltas."""
    adapted.double()
    leaves = [p for name, p in adapted.named_parameters() if "lora_" in name and "magnitude" not in name]
    dense = sum(0.3 * d.abs().sum() + 0.35 * d.square().sum() for d in dense_deltas(adapted))
    value, _ = penalty(adapted, l1=0.3, l2=0.7)
    close([value.detach(), *torch.autograd.grad(value, leaves)], [dense.detach(), *torch.autograd.grad(dense, leaves)], 1e-12)


def test_unscaled_penalty_is_the_sum_of_the_bare_products(adapted: Any) -> None:
    bare = [(f.B.double() @ f.A.double()).detach() for f in lora_factors(adapted)]
    value, norm = penalty(adapted, l1=1.0, l2=2.0, scaled=False)
    size = sum(product.abs().sum() for product in bare)
    torch.testing.assert_close(norm.double(), size, rtol=1e-5, atol=0)
    torch.testing.assert_close(value.double(), size + sum(p.square().sum() for p in bare), rtol=1e-5, atol=0)


def test_only_the_adapter_that_trains_counts(tiny_base: Any) -> None:
    """A reference adapter on the same model, as XRIGHT's DPO has, is neither penalised nor counted."""
    model = peft_model(AutoModelForCausalLM.from_pretrained(tiny_base))
    alone = penalty(model, l1=1.0, l2=0.0)[1]
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert torch.equal(penalty(model, l1=1.0, l2=0.0)[1], alone)
    model.set_adapter("ref")
    other = sum(delta.abs().sum() for delta in dense_deltas(model, "ref"))
    torch.testing.assert_close(penalty(model, l1=1.0, l2=0.0)[1].double(), other.detach(), rtol=1e-5, atol=0)
    assert len(list(lora_factors(model, "default"))) == 14
    model.requires_grad_(False)
    assert not list(lora_factors(model))


def test_what_is_no_single_product_is_named(tiny_base: Any) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4)

    model = get_peft_model(Net(), LoraConfig(target_modules=["conv", "linear"]))  # type: ignore[arg-type]
    assert nonlinear_layers(model) == ["base_model.model.conv"]
    both = peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), target_modules=["embed_tokens", "q_proj"])
    assert not nonlinear_layers(both)
