"""Full fine-tuning: δ = θ − θ_pre, its penalty against autograd, and a model that everybody can load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train_resume import Killed, die_at, killed, records
from test_train_stage import PREF_ROWS, SFT_ROWS, SHORT, logits, refused
from trainkit import parts, sft_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from paft.checkpoint import Checkpoint
from paft.data import dataset
from paft.delta import FullDelta
from paft.errors import MismatchError, UsageError
from paft.merge.engine import merge
from paft.provenance import content_hash, verify
from paft.recipe import DpoRecipe, SftRecipe
from paft.train import dense
from paft.train.dense import Start
from paft.train.stage import plan, train


def recipe(base: Path, kind: Any = SftRecipe, **fields: Any) -> Any:
    trainer = {**SHORT, "learning_rate": 1e-3, **fields.pop("trainer", {})}
    return kind(model=str(base), full=True, trainer=trainer, **fields)


def moved(base: Path, kind: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model some way from its base, with some entries where they were; and what the base has."""
    model = AutoModelForCausalLM.from_pretrained(base).to(kind)
    before = {name: theta.detach().clone() for name, theta in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for theta in model.parameters():
            step = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(kind)
            theta += 0.1 * step * (step > 0)
    return model, before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_value_and_gradient_are_autograds(kind: torch.dtype, tolerance: float, tied: bool, tiny_base: Path, tiny_tied_base: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_tied_base if tied else tiny_base
    monkeypatch.setattr(dense, "TILE", 100)  # several tiles a tensor, the last one short
    model, before = moved(base, kind)
    value, norm = Start(base, model).penalty(model, l1=0.3, l2=0.7)
    (2 * value).backward()
    found = {name: theta.grad for name, theta in model.named_parameters()}
    model.zero_grad()
    deltas = [theta - before[name] for name, theta in model.named_parameters()]
    size = torch.stack([delta.abs().sum() for delta in deltas]).sum()
    wanted = 0.3 * size + 0.7 * torch.stack([0.5 * delta.square().sum() for delta in deltas]).sum()
    (2 * wanted).backward()
    torch.testing.assert_close(value, wanted, rtol=tolerance, atol=0)
    torch.testing.assert_close(norm, size.detach(), rtol=tolerance, atol=0)
    for name, theta in model.named_parameters():
        torch.testing.assert_close(found[name], theta.grad, rtol=tolerance, atol=tolerance, msg=name)


def test_the_share_of_small_entries_is_counted(tiny_base: Path) -> None:
    model, before = moved(tiny_base, torch.float32)
    small = sum(int(((theta - before[name]).abs() < 0.05).sum()) for name, theta in model.named_parameters())
    entries = sum(theta.numel() for theta in model.parameters())
    same = sum(int((theta == before[name]).sum()) for name, theta in model.named_parameters())
    size = sum(float((theta - before[name]).abs().sum(dtype=torch.float64)) for name, theta in model.named_parameters())
    found = Start(tiny_base, model).measure(model, 0.05)
    assert (found["share_below_1e-5"], found["share_zero"]) == (small / entries, same / entries)
    assert found["l1"] == pytest.approx(size, rel=1e-12)


def test_a_model_comes_out_whose_delta_a_merge_takes(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = train(recipe(tiny_base, l1=1e-4), out, rows=SFT_ROWS, quiet=True)
    assert {"l1", "share_below_1e-5", "eval_loss"} <= manifest["metrics"].keys()
    assert (verify(out), manifest["base"]["content_sha256"]) == ([], content_hash(tiny_base))
    tuned, base = Checkpoint.open(out), Checkpoint.open(tiny_base)
    assert tuned.entries.keys() == base.entries.keys()
    theta, before = load_file(out / "model.safetensors"), load_file(tiny_base / "model.safetensors")
    delta = FullDelta(tuned, base, "")
    assert set(delta.names) == {name for name in theta if not torch.equal(theta[name], before[name])} == set(theta)
    merge([str(out)], base=str(tiny_base), method="task_arithmetic", parameters={}, weights=None, out=tmp_path / "m",
          dtype="float32")
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in theta.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.config.use_cache is AutoConfig.from_pretrained(tiny_base).use_cache is True
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(tiny_base).chat_template
    norm = sum(float((theta[name].double() - before[name].double()).abs().sum()) for name in theta)
    assert records(out)[0]["l1"] == 0 and manifest["metrics"]["l1"] == pytest.approx(norm, rel=1e-5)


def test_without_a_penalty_it_is_plain_trl(tiny_base: Path, tmp_path: Path) -> None:
    train(recipe(tiny_base, trainer={"max_length": 128}), tmp_path / "a", rows={"train": sft_rows(12), "eval": []}, quiet=True)
    model, tokenizer = parts(tiny_base)
    config = SFTConfig(output_dir=str(tmp_path / "s"), report_to="none", bf16=False, gradient_checkpointing=False, seed=0,
                       lr_scheduler_type="cosine", max_length=128, **{**SHORT, "learning_rate": 1e-3})
    plain = SFTTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=dataset(sft_rows(12)))
    plain.train()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(found), logits(plain.model.eval()))


def test_accumulation_adds_the_penalty_once(tiny_base: Path, tmp_path: Path) -> None:
    rows = {"train": sft_rows(8), "eval": []}  # answers of one length: every micro-batch has the same number of tokens
    losses = []
    for name, size, steps in (("a", 8, 1), ("b", 2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd", "max_steps": 2}
        train(recipe(tiny_base, l1=1.0, trainer=options), tmp_path / name, rows=rows, quiet=True)
        losses.append(load_file(tmp_path / name / "model.safetensors"))
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-5, atol=1e-6)


def test_dpo_has_the_base_as_its_reference(tiny_base: Path, tmp_path: Path) -> None:
    train(recipe(tiny_base, DpoRecipe), tmp_path / "a", rows=PREF_ROWS, quiet=True)
    first, second, *_ = [record for record in records(tmp_path / "a") if "loss" in record]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(second["rewards/margins"]) > 1e-4


def test_it_resumes_to_the_bit(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tiny_base, l1=1e-4, trainer={"save_steps": 1})
    train(made, tmp_path / "unbroken", rows=SFT_ROWS, quiet=True)
    with monkeypatch.context() as patch:
        die_at(2, killed, patch.setattr)
        with pytest.raises(Killed):
            train(made, tmp_path / "a", rows=SFT_ROWS, quiet=True)
    train(made, tmp_path / "a", rows=SFT_ROWS, resume=True, quiet=True)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "unbroken")
    assert records(tmp_path / "a") == records(tmp_path / "unbroken")


def test_the_plan_counts_every_weight(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in sft_rows(8)))
    foretold = plan(recipe(tiny_base, data=str(file)), tmp_path / "a")
    train(recipe(tiny_base, data=str(file)), tmp_path / "a", quiet=True)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert foretold["adapter_bytes"] == sum(4 * tensor.numel() for tensor in tensors.values())
    assert foretold["memory_bytes"] == 4 * foretold["adapter_bytes"]


def test_what_does_not_go_with_it(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    on = recipe(tiny_base, on=str(make_adapter(tiny_base, 1)))
    assert "full does not go with --on" in refused(UsageError, on, tmp_path / "a", SFT_ROWS, exit_code=2).message
    for fields in ({"l1": 1e-4, "l1_solver": "proximal"}, {"l1_target_sparsity": 0.5}):
        refused(UsageError, recipe(tiny_base, **fields), tmp_path / "a", SFT_ROWS, exit_code=2)
    diverged = recipe(tiny_base, trainer={"max_steps": 1, "learning_rate": float("inf")})
    assert "NaN" in refused(MismatchError, diverged, tmp_path / "a", {"train": sft_rows(4), "eval": []}, exit_code=3).message
