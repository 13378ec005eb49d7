"""Every statistic against the dense float64 delta, and a verdict that rescaling cannot fool."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paft.errors import MismatchError, UsageError
from paft.provenance import to_json
from paft.report import sparsity_tables
from paft.report.moments import Moments
from paft.report.reference import GAUSSIAN
from paft.report.sparsity import SparsityReport, sparsity

THRESHOLD = 1e-5


@dataclass(frozen=True)
class Factors:
    A: Tensor
    B: Tensor
    scale: float = 2.0
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class Source:
    name: str
    factors: dict[str, Factors]


def gaussian(m: int = 48, n: int = 80, r: int = 8, rms: float = 2e-5, scale: float = 2.0, seed: int = 0) -> Factors:
    """A dense delta with rms of about ``rms`` before scaling."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, n, generator=generator) / math.sqrt(r)
    return Factors(a, torch.randn(m, r, generator=generator) * rms, scale)


def all_zero() -> Factors:
    dense = gaussian()
    return Factors(dense.A, torch.zeros_like(dense.B))


def one_entry() -> Factors:
    a, b = torch.zeros(4, 30), torch.zeros(20, 4)
    a[2, 7], b[11, 2] = -3.0, 0.25
    return Factors(a, b, 0.5)


def block_sparse(rms: float = 2e-5) -> Factors:
    """A quarter of the rows times a quarter of the columns."""
    dense = gaussian(rms=rms)
    a, b = dense.A.clone(), dense.B.clone()
    a[:, 20:], b[12:] = 0, 0
    return Factors(a, b, dense.scale)


def huge_range() -> Factors:
    """Rows from 1e-35 to 1e35: products and squares that float32 cannot hold."""
    dense = gaussian(rms=1.0)
    return Factors(dense.A, dense.B * torch.logspace(-35, 35, 48)[:, None], 0.125)


def negative_scale() -> Factors:
    dense = gaussian()
    return Factors(dense.A, dense.B, -1.5)


def dead_rank() -> Factors:
    """Three ranks that add nothing: a zero row of A, a zero column of B, and both."""
    dense = gaussian()
    a, b = dense.A.clone(), dense.B.clone()
    a[2], b[:, 4], a[5], b[:, 5] = 0, 0, 0, 0
    return Factors(a, b, dense.scale)


def independent(law: str) -> Factors:
    """Entries drawn one by one, as a product with the identity."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(48, 80, generator=generator)
    if law == "laplace":  # as a difference of exponentials
        drawn = -torch.log1p(-torch.rand(48, 80, generator=generator)) + torch.log1p(-torch.rand(48, 80, generator=generator))
    return Factors(drawn * 1e-5, torch.eye(48))


CASES: dict[str, Callable[[], Factors]] = {
    "random": gaussian, "all zero": all_zero, "one entry": one_entry, "block-sparse": block_sparse,
    "huge scale range": huge_range, "rank one": lambda: gaussian(r=1), "negative scale": negative_scale,
    "scale zero": lambda: gaussian(scale=0.0), "one by one": lambda: gaussian(1, 1, 1), "ranks dead": dead_rank,
    "Gaussian": lambda: independent("gaussian"), "Laplace": lambda: independent("laplace"),
}  # fmt: skip


def flat(moments: Moments) -> dict[str, float]:
    """All numbers of moments, those of unbounded measures and of bounded ones."""
    found = moments.to_dict()
    bounds = {f"bound of {key}": value for key, value in found.pop("bounds").items()}
    return {key: value for key, value in (found | bounds).items() if value is not None}


def moments_of(factors: Factors, **options: int) -> Moments:
    return sparsity(Source("a", {"layers.0.q": factors}), threshold=THRESHOLD, **options).tensors[0].moments


@pytest.mark.parametrize("case", CASES)
def test_every_statistic_equals_the_dense_float64_reference(case: str) -> None:
    factors = CASES[case]()
    delta = factors.B.double() @ factors.A.double()
    added = (factors.scale * delta).abs()
    found = moments_of(factors, tile_rows=7)
    n, l1, l2 = delta.numel(), added.sum().item(), added.norm().item()
    assert found.entries == n
    assert found.below == (delta.abs() < THRESHOLD).sum().item()
    assert found.below_scaled == (added < THRESHOLD).sum().item()
    assert found.zeros == (delta == 0).sum().item()
    assert found.l1 == pytest.approx(l1, rel=1e-12)
    assert found.frobenius == pytest.approx(l2, rel=1e-12)
    assert found.rms == pytest.approx(added.square().mean().sqrt().item(), rel=1e-12)
    assert found.max == pytest.approx(added.max().item(), rel=1e-15)
    if l2 == 0:
        assert found.hoyer is None and found.n_eff is None
        return
    assert found.n_eff == pytest.approx(l1**2 / (n * added.square().sum().item()), rel=1e-12)
    if n > 1:
        assert found.hoyer == pytest.approx((math.sqrt(n) - l1 / l2) / (math.sqrt(n) - 1), abs=1e-12)
    normal = torch.distributions.Normal(0.0, torch.tensor(l2 / math.sqrt(n), dtype=torch.float64))
    expected = 1 - 2 * normal.cdf(torch.tensor(-THRESHOLD, dtype=torch.float64)).item()
    assert found.expected_scaled / n == pytest.approx(expected, abs=1e-12)


def test_a_large_gaussian_shows_the_gaussian_values() -> None:
    # B = identity, A = the delta: the entries are independent Gaussians.
    delta = torch.randn(400, 500, generator=torch.Generator().manual_seed(1)) * 1e-5
    found = moments_of(Factors(delta, torch.eye(400), 1.0))
    assert found.n_eff == pytest.approx(GAUSSIAN.n_eff, abs=3e-3)
    assert found.hoyer == pytest.approx(GAUSSIAN.hoyer, abs=3e-3)
    assert found.share == pytest.approx(found.expected / found.entries, abs=5e-3)
    assert found.share == pytest.approx(0.6827, abs=5e-3)  # P(|x| < one standard deviation)


def test_a_product_of_rank_one_has_its_own_value() -> None:
    assert moments_of(gaussian(2000, 2000, 1)).n_eff == pytest.approx((2 / math.pi) ** 2, rel=0.03)


@pytest.mark.parametrize("case", ["random", "block-sparse", "huge scale range"])
@pytest.mark.parametrize("tile_rows", [1, 5, 48, 1000])
def test_the_tile_size_does_not_matter(case: str, tile_rows: int) -> None:
    factors = CASES[case]()
    assert flat(moments_of(factors, tile_rows=tile_rows)) == pytest.approx(flat(moments_of(factors)), rel=1e-12)


def test_gauge_invariance() -> None:
    """(B·G, G⁻¹·A) is the same delta."""
    factors = gaussian()
    factors = Factors(factors.A.double(), factors.B.double())
    gauge = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 3 * torch.eye(8)
    turned = Factors(torch.linalg.solve(gauge, factors.A), factors.B @ gauge)
    assert flat(moments_of(turned)) == pytest.approx(flat(moments_of(factors)), rel=1e-9)
    powers = torch.tensor([2.0**k for k in range(-4, 4)])
    plain = gaussian()
    moved = Factors(plain.A / powers[:, None], plain.B * powers)
    assert flat(moments_of(moved)) == flat(moments_of(plain))


def report(make: Callable[..., Factors], rms: float) -> SparsityReport:
    names = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    return sparsity(Source("adapter", {name: make(rms=rms) for name in names}))


def test_both_averages_and_the_groups() -> None:
    """Layer 0 is small and large in numbers; the mean over layers ignores numbers, the mean over entries does not."""
    factors = {
        "base.layers.0.mlp.up_proj": gaussian(200, 80, rms=1e-7),
        "base.layers.10.mlp.up_proj": gaussian(20, 80, rms=1e-3),
        "base.layers.2.self_attn.q_proj": gaussian(20, 80, rms=1e-3),
        "lm_head": gaussian(500, 80, rms=1e-3),
    }
    found = sparsity(Source("a", factors))
    assert [group.label for group in found.layers] == ["0", "2", "10", "other"]
    assert {group.label: group.tensors for group in found.kinds} == {"up_proj": 2, "q_proj": 1, "lm_head": 1}
    shares = [group.moments.share for group in found.layers]
    assert found.layer_share == pytest.approx(sum(shares[:3]) / 3)
    below = sum(tensor.moments.below for tensor in found.tensors)
    assert found.overall.moments.share == below / (740 * 80)
    assert sparsity(Source("a", {"lm_head": gaussian()})).layer_share == pytest.approx(moments_of(gaussian()).share)


def test_the_dictionary_is_versioned_json() -> None:
    data = json.loads(to_json(sparsity(Source("half", {"a.0.b": all_zero(), "a.1.b": gaussian()})).to_dict()))
    assert data["schema"] == 2
    assert data["verdict"] == "dense" and data["overall"]["share_scaled"] > 0.5  # half is absent, half is not small
    assert data["tensors"][0]["hoyer"] is None and data["tensors"][0]["zeros"] == 48 * 80
    assert data["overall"]["share_unscaled"] > data["overall"]["share_scaled"]


def test_the_tables_show_every_adapter_and_every_part() -> None:
    reports = [report(gaussian, 2e-6), report(block_sparse, 1e-3)]
    rows, columns = sparsity_tables.summary(reports)
    assert [column.show(rows[0]) for column in columns] == ["verdict", "-", "dense, small", "sparse"]
    for by, parts in (("layer", 3), ("module", 2), ("tensor", 6)):
        rows, columns = sparsity_tables.breakdown(reports[0], by)
        assert len(rows) == parts + 1 and rows[-1]["label"] == "all"
        assert all(column.key in rows[0] for column in columns)


def test_bad_input_is_refused_by_name() -> None:
    broken = gaussian()
    broken.B[3, 3] = math.nan
    with pytest.raises(MismatchError, match=r"layers\.7\.q"):
        sparsity(Source("a", {"layers.7.q": broken}))
    with pytest.raises(MismatchError, match="no LoRA factors"):
        sparsity(Source("a", {}))
    for threshold in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError):
            sparsity(Source("a", {"q": gaussian()}), threshold=threshold)


def test_an_adapter_written_by_peft_equals_pefts_own_deltas(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from paft.adapter import read_adapter

    torch.manual_seed(0)
    small = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", rank_pattern={"down_proj": 2})
    model = get_peft_model(LlamaForCausalLM(small), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-5)
    model.save_pretrained(tmp_path)
    found = {tensor.name: tensor for tensor in sparsity(read_adapter(tmp_path)).tensors}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    assert len(found) == len(layers) == 14
    for name, module in layers.items():
        delta = module.get_delta_weight("default").detach()
        tensor = found[name.removeprefix("base_model.model.")]
        assert tensor.shape == tuple(delta.shape)
        assert tensor.moments.share_scaled == pytest.approx((delta.abs() < THRESHOLD).double().mean().item(), abs=2e-3)
        assert tensor.moments.frobenius == pytest.approx(delta.double().norm().item(), rel=1e-5)
        assert tensor.moments.l1 == pytest.approx(delta.double().abs().sum().item(), rel=1e-5)


def test_what_is_no_product_is_named_as_left_out(tmp_path: Path) -> None:
    """DoRA's factors are measured, its magnitudes are not; experts of one parameter are measured one by one."""
    from variantkit import make, save_model

    from paft.adapter import read_adapter

    bases = {kind: save_model(tmp_path / kind, kind) for kind in ("llama", "mixtral")}
    plain = sparsity(read_adapter(make(bases["llama"], tmp_path / "plain")))
    dora = sparsity(read_adapter(make(bases["llama"], tmp_path / "dora", use_dora=True, modules_to_save=["norm"])))
    assert plain.note is None
    assert len(dora.tensors) == len(plain.tensors) == 4
    assert dora.note is not None
    assert "the magnitudes of DoRA (model.layers.0.mlp.up_proj and 3 more)" in dora.note
    assert "model.norm.weight" in dora.to_dict()["left_out"]
    options = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    experts = sparsity(read_adapter(make(bases["mixtral"], tmp_path / "experts", **options)))
    assert {kind.label: kind.tensors for kind in experts.kinds} == {"q_proj": 2, "gate_up_proj": 6, "down_proj": 6}
