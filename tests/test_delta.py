"""ΔW over the base's tensors: exact, the same bits for any tile, gauge invariant; misfits are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import AdapterFactory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from paft.adapter import WEIGHTS, Adapter, Factors, read_adapter
from paft.checkpoint import SINGLE, Checkpoint
from paft.delta import Delta, FullDelta, LoraDelta, ProductTensor, spans, tile_rows
from paft.errors import MismatchError

UP = "model.layers.0.mlp.up_proj"


def whole(delta: Delta, name: str, elements: int = 1 << 18) -> torch.Tensor:
    tensor = delta.tensor(name, elements)
    return torch.cat([tensor.tile(start, stop) for start, stop in spans(tensor)])


def one_module(factors: Factors, module: str = UP) -> Adapter:
    return Adapter(Path(), "a", {}, "some/base", None, {module: factors}, "hash")


def test_lora_delta_in_float64(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    adapter = read_adapter(make_adapter(tiny_base, 1, use_rslora=True))
    delta = LoraDelta(adapter, Checkpoint.open(tiny_base))
    assert sorted(delta.names) == sorted(f"{module}.weight" for module in adapter.factors)
    for module, f in adapter.factors.items():
        want = f.scale * f.B.double() @ f.A.double()
        got = whole(delta, f"{module}.weight")
        assert got.shape == delta.shape(f"{module}.weight") == want.shape
        assert float((got - want).norm() / want.norm()) < 2e-7


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 200), columns=st.integers(1, 80), rank=st.integers(1, 20), step=st.integers(1, 200))
def test_tiles_have_the_same_bits(rows: int, columns: int, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    one, many = ProductTensor(left, right, rows, ""), ProductTensor(left, right, step, "")
    assert torch.equal(one.tile(0, rows), torch.cat([many.tile(a, b) for a, b in spans(many)]))


def test_threads_change_no_bit() -> None:
    left, right = torch.randn(500, 16), torch.randn(16, 700)
    tensor = ProductTensor(left, right, 128, "")
    before = tensor.tile(0, 500)
    torch.set_num_threads(2)
    try:
        assert torch.equal(before, tensor.tile(0, 500))
    finally:
        torch.set_num_threads(1)


def test_gauge_invariance(tiny_base: Path) -> None:
    """A -> QA, B -> BQᵀ leaves ΔW as it is."""
    base = Checkpoint.open(tiny_base)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    plain = whole(LoraDelta(one_module(Factors(a, b, 2.0, False)), base), UP + ".weight")
    turned = whole(LoraDelta(one_module(Factors(turn @ a, b @ turn.T, 2.0, False)), base), UP + ".weight")
    assert torch.allclose(plain, turned, atol=1e-5)


def test_tile_rows_come_in_whole_blocks() -> None:
    assert tile_rows(2048, 1 << 18) == 128
    assert tile_rows(100_000, 1 << 18) == 2
    assert tile_rows(10**9, 1 << 18) == 1
    assert tile_rows(0, 100) == 64


def test_conv1d_is_transposed_whatever_the_flag(tmp_path: Path) -> None:
    """PEFT corrects fan_in_fan_out by the layer's class; a square matrix shows that shapes alone cannot tell."""
    save_file({"transformer.h.0.attn.c_proj.weight": torch.zeros(6, 6)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    a, b = torch.randn(2, 6), torch.randn(6, 2)
    for flag in (True, False):
        adapter = one_module(Factors(a, b, 1.0, flag), "transformer.h.0.attn.c_proj")
        delta = LoraDelta(adapter, Checkpoint.open(tmp_path))
        assert torch.allclose(whole(delta, "transformer.h.0.attn.c_proj.weight"), (b @ a).T, atol=1e-6)


def test_base_saved_without_its_prefix(tmp_path: Path) -> None:
    """The hub's gpt2 stores h.0..., and adapters of it say transformer.h.0...."""
    save_file({"h.0.attn.c_attn.weight": torch.zeros(6, 9), "h.10.x.weight": torch.zeros(1)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    factors = Factors(torch.ones(2, 6), torch.ones(9, 2), 1.0, True)
    delta = LoraDelta(one_module(factors, "transformer.h.0.attn.c_attn"), Checkpoint.open(tmp_path))
    assert delta.names == ["h.0.attn.c_attn.weight"]


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        ("model.layers.7.mlp.up_proj", (48, 32), r"no tensor model\.layers\.7\.mlp\.up_proj\.weight"),
        (UP, (48, 31), r"up_proj\.weight is \[48, 31\], the base's is \[48, 32\]"),
        (UP, (32, 48), r"up_proj\.weight is \[32, 48\]"),
    ],
)
def test_wrong_base_is_named(tiny_base: Path, module: str, shape: tuple[int, int], message: str) -> None:
    factors = Factors(torch.ones(2, shape[1]), torch.ones(shape[0], 2), 1.0, False)
    with pytest.raises(MismatchError, match=message) as caught:
        LoraDelta(one_module(factors, module), Checkpoint.open(tiny_base))
    assert "some/base" in (caught.value.hint or "")


def test_two_modules_in_one_tensor_are_refused(tiny_base: Path) -> None:
    factors = Factors(torch.ones(2, 32), torch.ones(48, 2), 1.0, False)
    adapter = Adapter(Path(), "a", {}, None, None, {UP: factors, UP.removeprefix("model."): factors}, "hash")
    with pytest.raises(MismatchError, match="are both"):
        LoraDelta(adapter, Checkpoint.open(tiny_base))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_refused(
    tiny_base: Path, tiny_tied_base: Path, make_adapter: AdapterFactory, tmp_path: Path, stored: bool
) -> None:
    """Whether or not the file holds a copy of the head, loading ties it, so the change would reach the embedding."""
    adapter = read_adapter(make_adapter(tiny_base, 1, target_modules=["lm_head"]))
    base = shutil.copytree(tiny_tied_base, tmp_path / "base")
    if stored:
        tensors = load_file(base / SINGLE)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / SINGLE)
    with pytest.raises(MismatchError, match="lm_head is tied"):
        LoraDelta(adapter, Checkpoint.open(base))
    assert LoraDelta(adapter, Checkpoint.open(tiny_base)).names == ["lm_head.weight"]


def test_a_stored_copy_of_the_base_changes_nothing(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    """PEFT stores the head beside the factors when the head is a target, and replaces the base's with it on loading."""
    path = make_adapter(tiny_base, 1, target_modules=["lm_head"])
    adapter = read_adapter(path)
    assert adapter.saved.keys() == {"lm_head.weight"}
    delta = LoraDelta(adapter, Checkpoint.open(tiny_base))
    assert isinstance(delta.tensor("lm_head.weight"), ProductTensor)
    assert delta.modules == {"lm_head.weight": "lm_head"}
    assert not delta.adapter.saved


def test_a_leftover_weight_is_refused(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    path = make_adapter(tiny_base, 1)
    save_file(load_file(path / WEIGHTS) | {"base_model.model.extra.weight": torch.ones(2, 2)}, path / WEIGHTS)
    with pytest.raises(MismatchError, match=r"no tensor extra\.weight"):
        LoraDelta(read_adapter(path), Checkpoint.open(tiny_base))


def test_quantised_base_is_refused(tmp_path: Path) -> None:
    save_file({UP + ".weight": torch.zeros(48, 32, dtype=torch.uint8)}, tmp_path / SINGLE)
    factors = Factors(torch.ones(2, 32), torch.ones(48, 2), 1.0, False)
    with pytest.raises(MismatchError, match="quantised"):
        LoraDelta(one_module(factors), Checkpoint.open(tmp_path))


def test_full_delta(tmp_path: Path) -> None:
    base = {"m": torch.randn(5, 4).bfloat16(), "v": torch.randn(3), "s": torch.randn(2, 3, 4), "n": torch.tensor([1])}
    tuned = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    for name, tensors in {"base": base, "tuned": tuned}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / SINGLE)
    delta = FullDelta(Checkpoint.open(tmp_path / "tuned"), Checkpoint.open(tmp_path / "base"), "h")
    assert sorted(delta.names) == ["m", "s", "v"]
    for name in delta.names:
        want = (tuned[name].float() - base[name].float()).reshape(-1, base[name].shape[-1])
        assert torch.equal(whole(delta, name, elements=4), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.ones(1)}, "base has no tensor extra"),
        ({"m": torch.ones(2, 3)}, r"m is F32 \[2, 3\]"),
        ({"n": torch.tensor([2])}, "cannot be merged"),
    ],
)
def test_full_model_that_does_not_fit(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    base = {"m": torch.ones(2, 2), "n": torch.tensor([1])}
    for name, tensors in {"base": base, "tuned": base | change}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / SINGLE)
    with pytest.raises(MismatchError, match=message):
        FullDelta(Checkpoint.open(tmp_path / "tuned"), Checkpoint.open(tmp_path / "base"), "h")


def test_nan_in_a_full_model_names_the_tensor(tmp_path: Path) -> None:
    for name, value in {"base": 0.0, "tuned": float("nan")}.items():
        (tmp_path / name).mkdir()
        save_file({"m": torch.full((2, 2), value)}, tmp_path / name / SINGLE)
    delta = FullDelta(Checkpoint.open(tmp_path / "tuned"), Checkpoint.open(tmp_path / "base"), "h")
    with pytest.raises(MismatchError, match="tensor m"):
        whole(delta, "m")


def test_adapter_files_are_what_the_factory_wrote(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    """The delta of an adapter whose B is zero is zero everywhere."""
    path = make_adapter(tiny_base, 1)
    tensors = load_file(path / WEIGHTS)
    save_file({name: t * 0 if "lora_B" in name else t for name, t in tensors.items()}, path / WEIGHTS)
    delta = LoraDelta(read_adapter(path), Checkpoint.open(tiny_base))
    assert not any(whole(delta, name).any() for name in delta.names)
