"""What is measured while an adapter trains, against dense counts and the true gradient of the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_train_l1 import VARIANTS, conv1d_base, dense_deltas, peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from paft.train import l1
from paft.train.gauge import entry_gradient, gauge
from paft.train.l1 import lora_factors


@pytest.fixture(params=["linear", "conv1d", "rank_pattern", "embedding"])
def adapted(request: pytest.FixtureRequest, tiny_base: Path) -> Any:
    base = conv1d_base() if request.param == "conv1d" else AutoModelForCausalLM.from_pretrained(tiny_base)
    return peft_model(base, **VARIANTS[request.param])


def entries(model: Any, scaled: bool = True) -> Tensor:
    products = dense_deltas(model) if scaled else [f.B.double() @ f.A.double() for f in lora_factors(model)]
    return torch.cat([product.detach().flatten() for product in products])


@pytest.mark.parametrize("scaled", [True, False])
def test_shares_and_norms_are_the_dense_ones(adapted: Any, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l1, "TILE", 100)
    dense = entries(adapted, scaled)
    for threshold in (1e-5, 1e-4):
        found = gauge(adapted, threshold, scaled=scaled)
        counted = (dense.abs() < threshold).double().mean().item()
        assert 0 < counted < 1
        # float32 products may cross the threshold against the float64 count for a handful of entries
        assert found.below == pytest.approx(counted, abs=3 / len(dense))
    assert found.entries == len(dense)
    assert found.l1 == pytest.approx(dense.abs().sum().item(), rel=1e-5)
    assert found.l2 == pytest.approx(dense.norm().item(), rel=1e-5)
    assert (found.zero, found.zero_rows, found.zero_columns, found.dead_ranks) == (0, 0, 0, 0)
    assert gauge(torch.nn.Linear(2, 2)).entries == 0


def test_zeros_are_counted_by_rows_columns_and_ranks(adapted: Any) -> None:
    rows = columns = dead = wide = high = 0
    with torch.no_grad():
        for index, (_, A, B, _) in enumerate(lora_factors(adapted)):
            B[: index % 3] = 0
            A[:, : 2 * index % 5] = 0
            A[0], B[:, 0] = 0, 0
            rows, columns, dead = rows + index % 3, columns + 2 * index % 5, dead + 1
            high, wide = high + B.shape[0], wide + A.shape[1]
    found = gauge(adapted)
    assert found.zero == pytest.approx((entries(adapted) == 0).double().mean().item(), abs=1e-12)
    assert (found.zero_rows, found.zero_columns, found.dead_ranks) == (rows / high, columns / wide, dead)


def test_the_slack_is_a_threshold_per_column(adapted: Any) -> None:
    wanted = total = 0
    for _, A, B, s in lora_factors(adapted):
        bound = 1e-5 + 1e-3 * abs(s) * A.detach().double().norm(dim=0)
        wanted += int(((s * B.detach().double() @ A.detach().double()).abs() < bound).sum())
        total += A.shape[1] * B.shape[0]
    assert gauge(adapted, slack=1e-3).below == pytest.approx(wanted / total, abs=3 / total)
    assert gauge(adapted, slack=1e-3).below > gauge(adapted).below


def test_hoyer_tells_gaussian_from_sparse() -> None:
    gaussian = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert hoyer(gaussian) == pytest.approx(1 - math.sqrt(2 / math.pi), abs=0.01)
    single = torch.zeros(1000)
    single[3] = 5.0
    assert hoyer(single) == pytest.approx(1.0)
    assert hoyer(torch.full((1000,), -2.0)) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(hoyer(torch.zeros(1000)))


def hoyer(values: Tensor) -> float:
    """Of one layer whose δ is the row ``values``."""
    model: Any = get_peft_model(Row(len(values)), LoraConfig(r=1, lora_alpha=1, target_modules=["linear"]))  # type: ignore[arg-type]
    ((_, A, B, _),) = lora_factors(model)
    with torch.no_grad():
        A.copy_(values[None])
        B.fill_(1.0)
    return gauge(model).hoyer


class Row(torch.nn.Module):
    def __init__(self, columns: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(columns, 1, bias=False)


def true_entry_gradient(model: Any, tokens: Tensor) -> float:
    """rms of ∂L/∂W over the adapted layers' own weights, which the backward pass of the dense model gives."""
    layers = [module for name, module in model.named_modules() if name.endswith("base_layer")]
    for layer in layers:
        layer.weight.requires_grad_(True)
    model(tokens, labels=tokens).loss.backward()
    square = sum(layer.weight.grad.double().square().sum() for layer in layers)
    return math.sqrt(square / sum(layer.weight.numel() for layer in layers))


@pytest.mark.parametrize("steps", [0, 40])
@pytest.mark.parametrize("rank", [4, 8])
def test_the_entry_gradient_is_near_the_true_one(steps: int, rank: int, tiny_base: Path) -> None:
    """At the start B = 0 and A is random; after training both have moved, and a factor of two remains."""
    model = peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), r=rank)
    with torch.no_grad():
        for _, _, B, _ in lora_factors(model):
            B.zero_()
    tokens = torch.randint(6, 60, (8, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    true = true_entry_gradient(model, tokens)
    found = entry_gradient((each, each.B.grad) for each in lora_factors(model))  # type: ignore[misc]
    assert found == pytest.approx(true, rel=0.25) if not steps else 0.5 < found / true < 2
