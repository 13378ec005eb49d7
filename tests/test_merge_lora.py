"""A merge, a fine-tuned model or a delta file as a LoRA: PEFT loads it, and its error is the one that is reported."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file

from paft.adapter import CONFIG, WEIGHTS
from paft.checkpoint import SINGLE
from paft.errors import MismatchError, UsageError
from paft.merge.engine import merge
from paft.merge.extract import extract
from paft.provenance import verify

TIES = {"density": 0.4}


def run(inputs: list[Path], out: Path, method: str = "ties", **options: Any) -> dict[str, Any]:
    options = {"base": None, "parameters": TIES if method == "ties" else {}, "weights": None, **options}
    return merge([str(path) for path in inputs], method=method, out=out, **options)


def peft_deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each module's weight, in the weight's own layout, by the module's name."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    layers = [(name, each) for name, each in model.base_model.model.named_modules() if hasattr(each, "get_delta_weight")]
    assert all(each.scaling == {"default": 1.0} for _, each in layers)
    return {name: each.get_delta_weight("default").detach() for name, each in layers}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(1, 12)).logits


def full_deltas(base: Path, merged: Path) -> dict[str, torch.Tensor]:
    before, after = load_file(base / SINGLE), load_file(merged / SINGLE)
    return {name: after[name].double() - before[name].double() for name in before}


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def pair(tiny_base: Path, make_adapter: AdapterFactory) -> list[Path]:
    return [make_adapter(tiny_base, 1), make_adapter(tiny_base, 2, r=2, target_modules=["q_proj", "up_proj"])]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_exact_methods_give_the_merged_model_s_logits(
    kind: str, method: str, tiny_base: Path, gpt2: Path, make_adapter: AdapterFactory, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, targets = (tiny_base, ["q_proj", "up_proj"]) if kind == "llama" else (gpt2, ["c_attn", "c_fc"])
    inputs = [make_adapter(base, 1), make_adapter(base, 2, r=2, use_rslora=True, target_modules=targets)]
    run(inputs, tmp_path / "full", method)
    for name, options in {"lora": {}, "cut": {"max_error": 1e-6}}.items():
        report = run(inputs, tmp_path / name, method, output_kind="lora", **options)
        assert report["relative_error"] < 1e-6
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / name)
        want = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full"))
        assert torch.allclose(logits(model), want, atol=1e-4)
        assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), want, atol=1e-2)


@pytest.mark.parametrize("options", [{"rank": 6}, {"max_error": 0.3}], ids=str)
def test_truncated_ties_reports_the_error_that_peft_sees(
    options: dict[str, Any], pair: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    run(pair, tmp_path / "full")
    report = run(pair, tmp_path / "lora", output_kind="lora", **options)
    got, want = peft_deltas(tiny_base, tmp_path / "lora"), full_deltas(tiny_base, tmp_path / "full")
    lost = energy = 0.0
    for name, about in report["modules"].items():
        dense = want[name]
        error = float((dense - got[name.removesuffix(".weight")]).norm() / dense.norm())
        values = torch.linalg.svdvals(dense)
        best = float(values[about["rank"] :].norm() / values.norm())
        assert about["relative_error"] == pytest.approx(error, abs=1e-5)  # W + D was rounded to float32
        assert error <= 1.04 * best + 1e-6
        assert about["rank"] == 6 if "rank" in options else error <= 0.3
        lost, energy = lost + (error * float(dense.norm())) ** 2, energy + float(dense.norm()) ** 2
    assert report["relative_error"] == pytest.approx((lost / energy) ** 0.5, abs=1e-5)
    assert not report["exact"] and len(got) == 14
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert config["alpha_pattern"] == config["rank_pattern"] and bool(config["rank_pattern"]) == ("max_error" in options)
    manifest = json.loads((tmp_path / "lora" / "paft.json").read_text())
    assert manifest["metrics"]["modules"] == report["modules"]
    assert next(iter(options.items())) in manifest["recipe"].items()
    assert f"Relative error {report['relative_error']:.3g}" in (tmp_path / "lora" / "README.md").read_text()
    assert not verify(tmp_path / "lora")


def test_a_base_path_that_leads_nowhere_is_not_passed_on(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    for adapter, claim in zip(pair, ("/no/where/base", "org/base"), strict=True):
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": claim}))
    named = []
    for name, inputs in (("path", pair), ("id", pair[::-1])):
        run(inputs, tmp_path / name, "linear", base=str(tiny_base), output_kind="lora", allow_base_mismatch=True)
        named.append(json.loads((tmp_path / name / CONFIG).read_text())["base_model_name_or_path"])
    assert named == [str(tiny_base), "org/base"]


def test_a_linear_merge_is_cut_on_request(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    run(pair, tmp_path / "full", "task_arithmetic")
    report = run(pair, tmp_path / "lora", "task_arithmetic", output_kind="lora", rank=3)
    want, got = full_deltas(tiny_base, tmp_path / "full"), peft_deltas(tiny_base, tmp_path / "lora")
    for name, about in report["modules"].items():
        values = torch.linalg.svdvals(want[name])
        best = float(values[3:].norm() / values.norm())
        assert about["relative_error"] == pytest.approx(best, abs=1e-5)
        assert float((want[name] - got[name.removesuffix(".weight")]).norm() / values.norm()) == pytest.approx(best, abs=1e-5)
    assert report["rank"] == 3


def test_tiles_change_no_byte_and_seeds_move_the_sketch(pair: list[Path], tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {"tile_elements": 50}, "c": {"seed": 5}}.items():
        run(pair, tmp_path / name, output_kind="lora", rank=2, **options)
    a, b, c = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_fine_tuned_model_becomes_an_adapter(
    kind: str, tiny_base: Path, gpt2: Path, make_adapter: AdapterFactory, tmp_path: Path
) -> None:
    """Only what changed is in it, in the layout of the layer; GPT-2's files call the layers by shorter names."""
    base, prefix = (tiny_base, "") if kind == "llama" else (gpt2, "transformer.")
    run([make_adapter(base, 1, r=3)], tmp_path / "tuned", "task_arithmetic")
    before, after = load_file(base / SINGLE), load_file(tmp_path / "tuned" / SINGLE)
    still = [name for name in before if ".0." in name]  # the first layer did not change
    save_file(after | {name: before[name] for name in still}, tmp_path / "tuned" / SINGLE, metadata={"format": "pt"})
    report = extract(str(tmp_path / "tuned"), base=str(base), out=tmp_path / "lora", to_lora=True, rank=3)
    got, want = peft_deltas(base, tmp_path / "lora"), full_deltas(base, tmp_path / "tuned")
    changed = {name for name in want if want[name].any()}
    stem = {name: (prefix if not name.startswith(prefix) else "") + name.removesuffix(".weight") for name in changed}
    assert set(stem.values()) == got.keys() and changed == report["modules"].keys()
    assert all(torch.allclose(want[name].float(), got[stem[name]], rtol=0, atol=1e-5) for name in changed)
    assert report["relative_error"] < 1e-4
    with pytest.raises(UsageError, match="not of low rank"):
        extract(str(tmp_path / "tuned"), base=str(base), out=tmp_path / "no", to_lora=True)


def test_an_embedding_and_a_head_are_adapted(tiny_base: Path, tiny_tied_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    direction = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 32) * 0.1
    for base in (tiny_base, tiny_tied_base):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.model.embed_tokens.weight.data += direction
        if base is tiny_base:
            model.lm_head.weight.data -= direction
        model.save_pretrained(tmp_path / base.name)
    out = tmp_path / "lora"
    report = extract(str(tmp_path / tiny_base.name), base=str(tiny_base), out=out, to_lora=True, max_error=1e-3)
    assert {name: about["rank"] for name, about in report["modules"].items()} == {
        "model.embed_tokens.weight": 1, "lm_head.weight": 1,
    }  # fmt: skip
    got = peft_deltas(tiny_base, out)
    assert torch.allclose(got["model.embed_tokens"], direction, atol=1e-5)
    assert torch.allclose(got["lm_head"], -direction, atol=1e-5)
    with pytest.raises(MismatchError, match=r"change of model\.embed_tokens\.weight: the embedding and the head are tied"):
        extract(str(tmp_path / tiny_tied_base.name), base=str(tiny_tied_base), out=tmp_path / "no", to_lora=True, rank=1)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_an_adapter_cannot_hold_is_refused_by_name(dry_run: bool, tiny_base: Path, pair: list[Path], tmp_path: Path) -> None:
    run(pair[:1], tmp_path / "tuned", "task_arithmetic")
    tensors = load_file(tmp_path / "tuned" / SINGLE)
    tensors["model.layers.1.input_layernorm.weight"][0] += 1
    save_file(tensors, tmp_path / "tuned" / SINGLE)
    options = {"base": str(tiny_base), "output_kind": "lora", "rank": 2, "dry_run": dry_run}
    with pytest.raises(MismatchError, match=r"cannot hold the change of model\.layers\.1\.input_layernorm\.weight"):
        run([tmp_path / "tuned"], tmp_path / "out", "task_arithmetic", **options)
    assert not (tmp_path / "out").exists()


def test_partial_leaves_them_out_and_counts_them(tiny_base: Path, pair: list[Path], tmp_path: Path) -> None:
    run(pair[:1], tmp_path / "tuned", "task_arithmetic")
    tensors = load_file(tmp_path / "tuned" / SINGLE)
    tensors["model.norm.weight"][0] += 3
    save_file(tensors, tmp_path / "tuned" / SINGLE)
    out = tmp_path / "lora"
    report = extract(str(tmp_path / "tuned"), base=str(tiny_base), out=out, to_lora=True, rank=4, partial=True)
    energy = sum(float(delta.square().sum()) for delta in full_deltas(tiny_base, tmp_path / "tuned").values())
    assert report["left_out"] == ["model.norm.weight"] and len(peft_deltas(tiny_base, out)) == 14
    assert report["relative_error"] == pytest.approx(3 / energy**0.5, rel=1e-4)
    said = next(line for line in (out / "README.md").read_text().splitlines() if line.startswith("Left out"))
    assert said.startswith("Left out, and in the error: 1 tensor") and len(said) < 80


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "needs one": ({"output_kind": "lora"}, "not of low rank"),
    "both": ({"output_kind": "lora", "rank": 2, "max_error": 0.1}, "one of the two"),
    "rank": ({"output_kind": "lora", "rank": 0}, "rank must be"),
    "error": ({"output_kind": "lora", "max_error": 1.5}, "largest error must be"),
    "full": ({"output_kind": "full", "rank": 2}, "--rank and --max-error are for an adapter"),
    "delta": ({"output_kind": "delta", "max_error": 0.1}, "--rank and --max-error are for an adapter"),
    "dtype": ({"output_kind": "lora", "rank": 2, "dtype": "bfloat16"}, "written in float32"),
    "wide": ({"output_kind": "delta", "dtype": "float64"}, "holds float32"),
}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_options_that_do_not_fit_are_refused(case: str, dry_run: bool, pair: list[Path], tmp_path: Path) -> None:
    options, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        run(pair, tmp_path / "out", dry_run=dry_run, **options)
    assert not list(tmp_path.glob("[!b]*"))


def test_an_architecture_that_transformers_does_not_know(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    """The adapters' own names place the modules; the delta of a whole model cannot be placed."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"model_type": "in-house"}))
    run(pair, tmp_path / "lora", "linear", base=str(base), output_kind="lora")
    run(pair, tmp_path / "known", "linear", output_kind="lora")
    assert (tmp_path / "lora" / WEIGHTS).read_bytes() == (tmp_path / "known" / WEIGHTS).read_bytes()
    run(pair, tmp_path / "tuned", "linear", base=str(base))
    with pytest.raises(MismatchError, match="LoRA cannot hold the change of model"):
        extract(str(tmp_path / "tuned"), base=str(base), out=tmp_path / "no", to_lora=True, rank=2)


def test_a_zero_delta_is_no_adapter(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="zero everywhere"):
        run(pair, tmp_path / "out", "task_arithmetic", weights=[0.0, 0.0], output_kind="lora")


def test_from_adapters_through_a_delta_file_to_an_adapter(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    """A delta file of factors is still exactly low-rank; PEFT sees the same ΔW."""
    run(pair, tmp_path / "delta", "linear", output_kind="delta")
    report = extract(str(tmp_path / "delta"), base=None, out=tmp_path / "lora", to_lora=True)
    run(pair, tmp_path / "direct", "linear", output_kind="lora")
    got, want = peft_deltas(tiny_base, tmp_path / "lora"), peft_deltas(tiny_base, tmp_path / "direct")
    assert report["exact"] and got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], rtol=0, atol=1e-6) for name in want)
