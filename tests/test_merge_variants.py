"""Variants through the engine: weighted sums of unlike adapters, LoRA output or its refusal, bad input by exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clikit import Capture, assert_one_error
from safetensors.torch import load_file, save_file
from variantkit import edit_config, make, own_deltas, peft_deltas, save_model, tensors_of, wrapped

from paft.adapter import CONFIG, WEIGHTS
from paft.cli import invoke
from paft.errors import MismatchError, PaftError, UsageError
from paft.merge.engine import merge
from paft.merge.extract import extract

PRE = "base_model.model."


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    found = {kind: save_model(folder / kind, kind) for kind in ("llama", "qwen2", "mixtral", "gpt_neox")}
    return found | {"tied": save_model(folder / "tied", "llama", tied=True)}


def run(base: Path, inputs: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    options = {"method": "task_arithmetic", "parameters": {}, "weights": None, **options}
    return merge([str(each) for each in inputs], base=str(base), out=out, **options)


UNLIKE: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "use_rslora": True},
    {"target_modules": ["q_proj", "embed_tokens"], "lora_bias": False, "bias": "all"},
    {"target_modules": ["v_proj"], "modules_to_save": ["norm", "lm_head"], "lora_bias": True},
    {"target_modules": ["up_proj"], "trainable_token_indices": [4, 2], "r": 1},
]


def test_a_weighted_sum_of_unlike_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    base, weights = bases["qwen2"], [0.5, -1.0, 0.25, 2.0]
    adapters = [make(base, tmp_path / str(seed), seed, **options) for seed, options in enumerate(UNLIKE)]
    run(base, adapters, tmp_path / "out", weights=weights)
    deltas = [peft_deltas(base, adapter, tmp_path / f"peft-{adapter.name}") for adapter in adapters]
    got, before = tensors_of(tmp_path / "out"), tensors_of(base)
    for name in before:
        want = before[name].double() + sum(w * delta[name] for w, delta in zip(weights, deltas, strict=True))
        assert torch.allclose(got[name].double(), want, rtol=1e-6, atol=1e-6), name


def test_zero_weight_is_the_base_byte_for_byte(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["qwen2"]
    adapters = [make(base, tmp_path / str(seed), seed, **options) for seed, options in enumerate(UNLIKE)]
    for method in ("task_arithmetic", "ties", "dare_ties"):
        run(base, adapters, tmp_path / method, method=method, weights=[0.0] * 4)
        assert (tmp_path / method / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_masks_and_trims_do_not_depend_on_tiles(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["qwen2"]
    adapters = [make(base, tmp_path / str(seed), seed, **options) for seed, options in enumerate(UNLIKE)]
    for method in ("ties", "dare_ties"):
        for elements in (1 << 18, 100):
            parameters = {"density": 0.5}
            run(base, adapters, tmp_path / f"{method}-{elements}", method=method, parameters=parameters, tile_elements=elements)
        one, two = (tmp_path / f"{method}-{elements}" / "model.safetensors" for elements in (1 << 18, 100))
        assert one.read_bytes() == two.read_bytes()


EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "renamed-head": ("gpt_neox", {"target_modules": ["lm_head", "query_key_value"], "use_rslora": True}),
    "saved-copies": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("case", EXACT)
def test_adapter_output_of_products_is_exact(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, options = EXACT[case]
    paths = [make(bases[kind], tmp_path / str(seed), seed, **{**options, "r": 1 + seed}) for seed in (1, 2)]
    for path in paths:  # modules that were saved and not trained
        before = {PRE + name: tensor for name, tensor in tensors_of(bases[kind]).items()}
        save_file({key: before.get(key, tensor) for key, tensor in load_file(path / WEIGHTS).items()}, path / WEIGHTS)
    run(bases[kind], paths, tmp_path / "out", weights=[0.5, -2.0], output_kind="lora")
    one, two, got = (own_deltas(bases[kind], path) for path in (*paths, tmp_path / "out"))
    assert got.keys() == one.keys()
    for name in got:
        assert torch.allclose(got[name], 0.5 * one[name] - 2.0 * two[name], rtol=1e-5, atol=1e-6), name
    wrapped(bases[kind], tmp_path / "out")  # plain PEFT loads it
    assert "norm" not in (tmp_path / "out" / CONFIG).read_text()


REFUSED: dict[str, tuple[str, dict[str, Any], type[PaftError], str]] = {
    "dora": ("llama", {"use_dora": True}, UsageError, "not of low rank"),
    "tokens": ("llama", {"trainable_token_indices": [1]}, UsageError, r"not of low rank \(model\.embed_tokens"),
    "saved": ("llama", {"modules_to_save": ["norm"]}, MismatchError, r"change of model\.layers\.0\.input_layernorm\.weight"),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}, MismatchError, r"change of .*q_proj\.bias"),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}, MismatchError, r"experts\.0\.w2"),
    "router": ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"]}, MismatchError, "block_sparse_moe.gate"),
    "tied": ("tied", {"target_modules": ["lm_head"], "ensure_weight_tying": True}, MismatchError, "are tied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapter_output_of_anything_else_is_refused(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, options, error, message = REFUSED[case]
    adapter = make(bases[kind], tmp_path / "adapter", **options)
    with pytest.raises(error, match=message):
        run(bases[kind], [adapter], tmp_path / "out", output_kind="lora")
    assert [each.name for each in tmp_path.iterdir()] == ["adapter"]


def test_dora_as_a_plain_lora_by_rank(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of full rank it is exact; what it costs below that is told."""
    adapter = make(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    report = run(bases["llama"], [adapter], tmp_path / "whole", output_kind="lora", rank=32)
    assert report["relative_error"] < 1e-5
    got, want = own_deltas(bases["llama"], tmp_path / "whole"), own_deltas(bases["llama"], adapter)
    assert all(torch.allclose(got[name], want[name], atol=1e-5) for name in want)
    assert run(bases["llama"], [adapter], tmp_path / "cut", output_kind="lora", rank=3)["relative_error"] > 0.01


@pytest.mark.parametrize("number", range(len(UNLIKE)))
def test_a_delta_file_of_a_variant_is_the_variant(bases: dict[str, Path], tmp_path: Path, number: int) -> None:
    adapter = make(bases["qwen2"], tmp_path / "adapter", **UNLIKE[number])
    extract(str(adapter), base=str(bases["qwen2"]), out=tmp_path / "delta")
    for name, each in {"one": adapter, "two": tmp_path / "delta"}.items():
        run(bases["qwen2"], [each], tmp_path / name)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def rewrite(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    return lambda adapter: save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)


def cut(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-4])


def garbage(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(b"\x10" + bytes(7) + b"not a header at all")


def nan_in(part: str) -> Callable[[Path], object]:
    return rewrite(lambda tensors: {k: t * float("nan") if part in k else t for k, t in tensors.items()})


BAD: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "truncated": ({}, cut, "adapter_model.safetensors"),
    "corrupt": ({}, garbage, "adapter_model.safetensors"),
    "empty": ({}, rewrite(lambda tensors: {}), "is empty"),
    "nan-magnitude": ({"use_dora": True}, nan_in("magnitude"), "holds NaN"),
    "nan-bias": ({"lora_bias": True}, nan_in("lora_B.bias"), "holds NaN"),
    "nan-embedding": ({"target_modules": ["embed_tokens"]}, nan_in("embedding_A"), "holds NaN"),
    "nan-saved": ({"modules_to_save": ["norm"]}, nan_in("model.norm"), "holds NaN"),
    "nan-rows": ({"trainable_token_indices": [1]}, nan_in("trainable"), "holds NaN"),
    "resized": (
        {"modules_to_save": ["lm_head"]},
        rewrite(lambda t: t | {PRE + "lm_head.weight": torch.zeros(44, 32)}), "lm_head.weight is [44, 32]"),
    "shape": (
        {"target_modules": ["v_proj"]},
        rewrite(lambda t: {k: x[:5] if k.endswith("B.weight") else x for k, x in t.items()}), "is [5, 32], the base's is [16"),
    "variant": ({}, lambda adapter: edit_config(adapter, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_3(bases: dict[str, Path], tmp_path: Path, case: str, capsys: Capture) -> None:
    options, harm, said = BAD[case]
    adapter = make(bases["qwen2"], tmp_path / "adapter", **{"target_modules": ["q_proj"], **options})
    harm(adapter)
    out = tmp_path / "room" / "out"
    capsys.readouterr()
    assert_one_error(capsys, invoke(["merge", str(adapter), "-o", str(out)]), 3, said)
    assert not out.parent.exists()


def test_the_same_adapter_twice_is_one_line_and_3(bases: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    adapter = make(bases["llama"], tmp_path / "adapter")
    capsys.readouterr()
    assert_one_error(capsys, invoke(["merge", str(adapter), str(adapter), "-o", str(tmp_path / "out")]), 3, "given twice")
    assert [each.name for each in tmp_path.iterdir()] == ["adapter"]
