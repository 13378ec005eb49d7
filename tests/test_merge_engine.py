"""Merged directories: exact, byte for byte where nothing changes, the same bytes for any tile; plain transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import AdapterFactory
from methodkit import BUSY, EXACTLY_TWO, LINEAR, MEANS, RANDOM, UNWEIGHTED
from safetensors.torch import load_file, save_file

from paft.adapter import WEIGHTS, read_adapter
from paft.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from paft.merge import methods
from paft.merge.engine import merge
from paft.merge.settings import Settings, native

ROOT = Path(__file__).resolve().parents[1]


def run(inputs: list[Path], out: Path, method: str = "task_arithmetic", **options: Any) -> dict[str, Any]:
    options = {"base": None, "parameters": BUSY.get(method, {}), "weights": None, **options}
    return merge([str(path) for path in inputs], method=method, out=out, **options)


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def full_delta(adapter: Path) -> dict[str, torch.Tensor]:
    """ΔW in float64 by tensor name."""
    factors = read_adapter(adapter).factors
    return {f"{module}.weight": f.scale * f.B.double() @ f.A.double() for module, f in factors.items()}


@pytest.fixture
def pair(tiny_base: Path, make_adapter: AdapterFactory) -> list[Path]:
    return [make_adapter(tiny_base, seed) for seed in (1, 2)]


@pytest.fixture
def narrow_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base in bfloat16 and in three shards, with a negative zero that must survive."""
    base = shutil.copytree(tiny_base, tmp_path / "narrow")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / SINGLE).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][0, :4] = -0.0
    (base / SINGLE).unlink()
    names = list(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::3], file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (base / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return base


# What is written


@pytest.mark.parametrize("method", methods.names())
def test_bytes_do_not_depend_on_tiles_or_threads(pair: list[Path], narrow_base: Path, tmp_path: Path, method: str) -> None:
    outs = []
    for elements, threads in ((1 << 18, 1), (1, 3), (100, 2), (32 * 64, 8)):
        out = tmp_path / f"out-{elements}"
        run(pair, out, method, base=str(narrow_base), tile_elements=elements, threads=threads)
        outs.append({name: digest for name, digest in digests(out).items() if name != "paft.json"})
    assert all(each == outs[0] for each in outs)


@pytest.mark.parametrize("method", [name for name in methods.names() if name not in MEANS | UNWEIGHTED])
def test_zero_weight_is_the_base_byte_for_byte(pair: list[Path], narrow_base: Path, tmp_path: Path, method: str) -> None:
    run(pair, tmp_path / "out", method, base=str(narrow_base), weights=[0.0, 0.0])
    base, out = digests(narrow_base), digests(tmp_path / "out")
    assert {name: out[name] for name in base} == base
    assert out.keys() - base.keys() == {"README.md", "paft.json"}


@pytest.mark.parametrize("method", sorted(MEANS))
def test_zero_weight_of_one_is_the_other_alone(pair: list[Path], tmp_path: Path, method: str) -> None:
    run(pair, tmp_path / "out", method, weights=[1.0, 0.0])
    run(pair[:1], tmp_path / "alone")
    assert digests(tmp_path / "out")[SINGLE] == digests(tmp_path / "alone")[SINGLE]


def test_untouched_tensors_and_layout_are_the_base_s(
    narrow_base: Path, make_adapter: AdapterFactory, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, 1, target_modules=["v_proj"])
    run([adapter], tmp_path / "out", base=str(narrow_base))
    base, out = digests(narrow_base), digests(tmp_path / "out")
    assert all(out[name] == base[name] for name in base if not name.endswith(".safetensors"))
    before, after = Checkpoint.open(narrow_base), Checkpoint.open(tmp_path / "out")
    assert list(before.entries) == list(after.entries)
    for name in before.entries:
        assert (before.raw(name) == after.raw(name)) == ("v_proj" not in name)
    for file in before.files:
        assert read_header(file) == read_header(tmp_path / "out" / file.name)


def test_rounded_once(pair: list[Path], narrow_base: Path, tmp_path: Path) -> None:
    """A bfloat16 result is the float64 sum rounded to the nearest, but for sums at a midpoint in float32."""
    run(pair, tmp_path / "out", base=str(narrow_base))
    base, got = weights_of(narrow_base), weights_of(tmp_path / "out")
    deltas = [full_delta(path) for path in pair]
    for name in deltas[0]:
        want = (base[name].double() + deltas[0][name] + deltas[1][name]).bfloat16()
        assert float((got[name] != want).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype(pair: list[Path], narrow_base: Path, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    run(pair, tmp_path / "out", base=str(narrow_base), dtype=dtype)
    kind = getattr(torch, dtype)
    got, base = weights_of(tmp_path / "out"), weights_of(narrow_base)
    assert {tensor.dtype for tensor in got.values()} == {kind}
    assert torch.equal(got["model.norm.weight"], base["model.norm.weight"].to(kind))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kind
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())


def test_order_of_three_adapters(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    paths = [make_adapter(tiny_base, seed) for seed in (1, 2, 3)]
    for method in [name for name in methods.names() if name not in EXACTLY_TWO]:
        run(paths, tmp_path / f"{method}-a", method)
        run(paths[::-1], tmp_path / f"{method}-b", method)
        first, second = weights_of(tmp_path / f"{method}-a"), weights_of(tmp_path / f"{method}-b")
        assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-6) for name in first), method


@pytest.mark.parametrize("method", methods.names())
def test_gauge(pair: list[Path], tmp_path: Path, method: str) -> None:
    """A -> QA, B -> BQᵀ. Random masks follow the factors' hash, so they are turned off here."""
    turned = [shutil.copytree(path, tmp_path / f"turned-{i}") for i, path in enumerate(pair)]
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    for path in turned:
        tensors = load_file(path / WEIGHTS)
        save_file({n: (turn @ t if "lora_A" in n else t @ turn.T).contiguous() for n, t in tensors.items()}, path / WEIGHTS)
    parameters = {} if method in RANDOM else BUSY.get(method, {})
    for name, paths in {"plain": pair, "turned-out": turned}.items():
        run(paths, tmp_path / name, method, parameters=parameters)
    plain, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "turned-out")
    different = sum(int(((plain[n] - other[n]).abs() > 1e-5).sum()) for n in plain)
    assert different <= 2 * len(plain)  # an entry at the trimming threshold may change sides


def test_seed_moves_the_masks_and_is_recorded(pair: list[Path], tmp_path: Path) -> None:
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        run(pair, tmp_path / name, "dare_linear", seed=seed)
    a, b, c = (digests(tmp_path / name)[SINGLE] for name in "abc")
    assert a == b != c
    assert json.loads((tmp_path / "a" / "paft.json").read_text())["seed"] == 1


def test_full_models_are_inputs_too(tiny_base: Path, pair: list[Path], tmp_path: Path) -> None:
    """A folded adapter beside another adapter gives what both adapters give, up to the folding's rounding."""
    run(pair[:1], tmp_path / "folded")
    run([tmp_path / "folded", pair[1]], tmp_path / "mixed", base=str(tiny_base))
    run(pair, tmp_path / "both")
    mixed, both = weights_of(tmp_path / "mixed"), weights_of(tmp_path / "both")
    assert all(torch.allclose(mixed[name], both[name], rtol=0, atol=1e-6) for name in both)


@pytest.mark.parametrize("method", sorted(LINEAR))
def test_adapter_output_is_exact(
    tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, method: str
) -> None:
    inputs = [make_adapter(tiny_base, 1), make_adapter(tiny_base, 2, r=2, target_modules=["q_proj", "up_proj"])]
    run(inputs, tmp_path / "full", method)
    report = run(inputs, tmp_path / "lora", method, output_kind="lora")
    assert report["rank"] in (4, 6)
    run([tmp_path / "lora"], tmp_path / "folded")
    full, folded = weights_of(tmp_path / "full"), weights_of(tmp_path / "folded")
    assert all(torch.allclose(full[name], folded[name], rtol=0, atol=1e-6) for name in full)


# End to end in plain transformers


def gpt2(path: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_are_those_of_the_base_plus_delta(
    kind: str, tiny_tied_base: Path, make_adapter: AdapterFactory, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_tied_base if kind == "llama" else gpt2(tmp_path / "base")
    paths = [make_adapter(base, seed) for seed in (1, 2)]
    run(paths, tmp_path / "out", parameters={"lambda": 0.5}, weights=[1.0, -0.5])
    model = AutoModelForCausalLM.from_pretrained(base)
    for path, weight in zip(paths, (0.5, -0.25), strict=True):
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        for name, module in peft.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                model.get_submodule(name).weight.data += weight * module.get_delta_weight("default").detach()
    tokens = torch.arange(12).view(1, 12)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(merged(tokens).logits, model(tokens).logits, atol=1e-4)
    assert not torch.allclose(merged(tokens).logits, AutoModelForCausalLM.from_pretrained(base)(tokens).logits, atol=1e-2)


# What is reported


def test_report_and_provenance(tiny_base: Path, pair: list[Path], narrow_base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = run(
        pair,
        tmp_path / "out",
        "ties",
        base=str(narrow_base),
        parameters={"density": [0.25, 1.0]},
        progress=lambda done, total, name: seen.append((done, total)),
    )
    shares = [adapter["kept_share"] for adapter in report["adapters"]]
    assert shares == [pytest.approx(0.25, abs=1e-3), 1.0]
    assert 0.1 < report["sign_conflicts"] < 0.15  # half of the quarter that both keep
    assert report["tensors"] == {"merged": 14, "copied": 7}
    assert seen[-1] == (21, 21)
    base, out = weights_of(narrow_base), weights_of(tmp_path / "out")
    applied = {name: out[name].double() - base[name].double() for name in base}
    norm = sum(float(delta.square().sum()) for delta in applied.values()) ** 0.5
    assert norm == pytest.approx(report["merged_norm"], rel=1e-2)
    assert 0 < report["rounding"]["relative_error"] < 0.01
    manifest = json.loads((tmp_path / "out" / "paft.json").read_text())
    assert manifest["recipe"]["parameters"]["lambda"] == 1.0
    assert manifest["base"]["name"] == "narrow"
    assert [each["content_sha256"] for each in manifest["inputs"]] == [read_adapter(path).content_hash for path in pair]
    for file in ("paft.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / file).read_text()
    header = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert header["tags"] == ["paft", "merge"]


def test_rounding_report_tells_a_delta_that_bfloat16_swallows(
    tiny_base: Path, make_adapter: AdapterFactory, narrow_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, 1, alpha=0.001)
    rounding = run([adapter], tmp_path / "out", base=str(narrow_base))["rounding"]
    assert rounding["entries_surviving"] < 0.3
    assert rounding["energy_surviving"] < 0.7
    rounding = run([adapter], tmp_path / "wide", base=str(narrow_base), dtype="float32")["rounding"]
    assert rounding["entries_surviving"] > 0.99
    assert rounding["relative_error"] < 1e-3


def test_dry_run_writes_nothing(pair: list[Path], tmp_path: Path) -> None:
    plan = run(pair, tmp_path / "out", "ties", dry_run=True)
    assert not list(tmp_path.iterdir())
    written = run(pair, tmp_path / "out", "ties")
    assert plan["tensors"] == written["tensors"]
    assert plan["bytes"]["read"] == written["bytes"]["read"]
    assert 0 <= written["bytes"]["written"] - plan["bytes"]["written"] < 10_000  # the file's header
    assert plan["seconds"] >= 0


@pytest.mark.parametrize("file", sorted((ROOT / "merges").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_name_every_parameter(file: Path) -> None:
    recipe = yaml.safe_load(file.read_text())
    if recipe.get("kind") != "merge":
        pytest.skip("a pipeline")
    told = Settings.read(native(recipe["method"], recipe["dialect"]), ["a", "b"], recipe["parameters"], recipe["weights"])
    assert told.record(["a", "b"])["parameters"] == recipe["parameters"]
    assert file.read_text().startswith("# ")
