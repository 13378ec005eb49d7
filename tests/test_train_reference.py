"""π_ref: against an explicit DPO loss of two models in float64, against runs by hand, and against each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from peft import PeftModel
from preferencekit import LORA, SGD, ours, recipe_of
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid
from trainkit import distance, factors, identical, parts, pref_rows, saved, start_away_from_zero
from transformers import AutoModelForCausalLM
from variantkit import make, wrapped

from paft.models import load_model, load_tokenizer
from paft.provenance import content_hash, read_manifest
from paft.recipe import SftRecipe
from paft.train import losses, stage
from paft.train.reference import Reference, check_files, prepare
from paft.train.stage import train

STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0, "learning_rate": 1e-2}
ROWS = {"train": pref_rows(12), "eval": pref_rows(6, seed=9)}


def laid_on(adapter: Path) -> Reference:
    return Reference(adapter=adapter, record={"name": str(adapter)})


def log_probability(model: Any, tokenizer: Any, row: dict[str, str], answer: str) -> Tensor:
    """log π of the answer's tokens and eos after the prompt, by the definition."""
    prompt = len(tokenizer(row["prompt"])["input_ids"])
    ids = torch.tensor([tokenizer(row["prompt"] + row[answer])["input_ids"] + [tokenizer.eos_token_id]])
    found = log_softmax(model(ids).logits[0, :-1], dim=-1)
    return found.gather(1, ids[0, 1:, None]).squeeze(1)[prompt - 1:].sum()


def explicit_loss(policy: Any, reference: Any, tokenizer: Any, rows: Any, beta: float) -> Tensor:
    terms = []
    for row in rows:
        with torch.no_grad():
            fixed = {answer: log_probability(reference, tokenizer, row, answer) for answer in ("chosen", "rejected")}
        moving = {answer: log_probability(policy, tokenizer, row, answer) - fixed[answer] for answer in fixed}
        terms.append(-logsigmoid(beta * (moving["chosen"] - moving["rejected"])))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_reference_adapter_is_dpo_of_two_models_in_float64(dropout: float, tiny_base: Path, make_adapter: AdapterFactory,
                                                             tmp_path: Path) -> None:
    """Value and gradient of one step; a reference has no dropout, whatever its adapter was trained with."""
    other = make_adapter(tiny_base, seed=3, target_modules=["q_proj", "up_proj"], lora_dropout=dropout)
    options = {**SGD, "learning_rate": 1e-2, "max_steps": 1, "per_device_train_batch_size": 8}
    trainer = start_away_from_zero(ours(tiny_base, tmp_path, "sigmoid", reference=laid_on(other), trainer=options))
    start = factors(trainer)
    trainer.model.save_pretrained(tmp_path / "policy", selected_adapters=["default"])
    trainer.train()

    base = AutoModelForCausalLM.from_pretrained
    policy = PeftModel.from_pretrained(base(tiny_base), tmp_path / "policy", is_trainable=True).double()
    reference = PeftModel.from_pretrained(base(tiny_base), other).double().eval()
    loss = explicit_loss(policy, reference, load_tokenizer(str(tiny_base)), pref_rows(8), beta=0.1)
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), abs=2e-6)
    assert abs(float(loss.detach()) - math.log(2)) > 1e-3
    slopes = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    after = factors(trainer)
    assert {name for name in start if ".default." in name} == set(slopes)
    for name, slope in slopes.items():
        torch.testing.assert_close(((start[name] - after[name]) / 1e-2).double(), slope, rtol=1e-3, atol=1e-5)
    fixed = [name for name in start if ".ref." in name]
    assert fixed and all(torch.equal(start[name], after[name]) for name in fixed)


@pytest.fixture(scope="module")
def folded(tiny_base: Path, make_adapter: AdapterFactory,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(an adapter, the model that has it folded in)."""
    adapter, model = make_adapter(tiny_base, seed=4), tmp_path_factory.mktemp("folded") / "model"
    load_model(str(tiny_base), on=str(adapter)).save_pretrained(model)
    load_tokenizer(str(tiny_base)).save_pretrained(model)
    yield adapter, model


@pytest.mark.parametrize("options", [
    {"use_dora": True}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [7, 9]}, {"use_rslora": True},
    {"target_modules": ["embed_tokens", "q_proj"]}], ids=str)
def test_every_kind_of_adapter_is_as_a_reference_what_it_is_in_peft(options: dict[str, Any], tiny_base: Path,
                                                                    tmp_path: Path) -> None:
    adapter = make(tiny_base, tmp_path / "adapter", **options)
    wrapped(tiny_base, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(str(tiny_base)).save_pretrained(tmp_path / "merged")
    check_files(recipe_of(tiny_base, "ipo", reference=str(adapter)))
    second = Reference(model=str(tmp_path / "merged"), record={"name": "merged"})
    laid, merged, none = (
        torch.tensor(ours(tiny_base, tmp_path, "ipo", reference=reference,
                          trainer={"precompute_ref_log_probs": True}).train_dataset["ref_chosen_logps"])
        for reference in (laid_on(adapter), second, None))
    torch.testing.assert_close(laid, merged, rtol=1e-5, atol=1e-5)
    assert (laid - none).abs().max() > 1e-2


@pytest.mark.parametrize("loss", ["ipo", "kto"])
def test_a_model_as_reference_is_the_adapter_that_is_folded_into_it(loss: str, tiny_base: Path, folded: tuple[Path, Path],
                                                                    tmp_path: Path) -> None:
    adapter, model = folded
    for name, reference in (("adapter", adapter), ("model", model), ("base", None)):
        recipe = recipe_of(tiny_base, loss, reference=reference and str(reference),
                           trainer=STEPS | {"optim": "sgd", "learning_rate": 1.0, "precompute_ref_log_probs": False})
        train(recipe, tmp_path / name, rows=ROWS, quiet=True)
    found = {name: saved(tmp_path / name) for name in ("adapter", "model", "base")}
    assert 100 * distance(found["adapter"], found["model"]) < distance(found["adapter"], found["base"]) > 1e-7
    said = read_manifest(tmp_path / "model")
    assert said and said["reference"] == {"name": str(model), "content_sha256": content_hash(model), "precomputed": False}


def test_chosen_sft_is_two_runs_by_hand(tiny_base: Path, tmp_path: Path) -> None:
    own = {"learning_rate": 3e-2, "num_train_epochs": 2}
    recipe = recipe_of(tiny_base, "sigmoid", reference="chosen-sft", trainer=STEPS, reference_sft=own)
    manifest = train(recipe, tmp_path / "at once", rows=ROWS, quiet=True)
    answers = {name: [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows] for name, rows in ROWS.items()}
    train(SftRecipe(model=str(tiny_base), lora=LORA, trainer=STEPS | own), tmp_path / "sft", rows=answers, quiet=True)
    recipe = recipe_of(tiny_base, "sigmoid", reference=str(tmp_path / "sft"), trainer=STEPS)
    train(recipe, tmp_path / "dpo", rows=ROWS, quiet=True)
    assert identical(saved(tmp_path / "at once" / "reference"), saved(tmp_path / "sft"))
    assert identical(saved(tmp_path / "at once"), saved(tmp_path / "dpo"))
    assert manifest["reference"]["content_sha256"] == content_hash(tmp_path / "sft")
    first = (tmp_path / "at once" / "log.jsonl").read_text().splitlines()[0]
    assert '"rewards/margins": 0.0' not in first
    assert {file.name for file in (tmp_path / "at once").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "paft.json", "log.jsonl", "reference"}


def test_chosen_sft_of_labelled_rows_learns_the_desirable_ones(tiny_base: Path, tmp_path: Path) -> None:
    labelled = {name: losses.unpair(rows) for name, rows in ROWS.items()}
    train(recipe_of(tiny_base, "kto", reference="chosen-sft", trainer=STEPS), tmp_path / "kto", rows=labelled, quiet=True)
    train(recipe_of(tiny_base, "ipo", reference="chosen-sft", trainer=STEPS), tmp_path / "ipo", rows=ROWS, quiet=True)
    assert identical(saved(tmp_path / "kto" / "reference"), saved(tmp_path / "ipo" / "reference"))


def test_a_chosen_sft_that_stands_there_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    """What a killed run left is used again, unless the recipe or the rows are others."""
    def made(**fields: Any) -> int:
        recipe = recipe_of(tiny_base, "ipo", reference="chosen-sft", trainer=STEPS, **fields)
        prepare(recipe, ROWS, tmp_path, tmp_path, stage.train)
        return (tmp_path / "reference" / "paft.json").stat().st_mtime_ns

    first = made()
    assert made() == first
    assert made(seed=1) != first


def test_on_top_of_an_adapter_the_reference_is_still_one_of_the_base(tiny_base: Path, make_adapter: AdapterFactory,
                                                                     tmp_path: Path) -> None:
    """The start model is base + on, so a reference that equals ``on`` has no margin at first, and another one has."""
    on, other = make_adapter(tiny_base, seed=1, target_modules=["q_proj"]), make_adapter(tiny_base, seed=2)
    held = {}
    for name, reference in (("same", on), ("other", other)):
        still = recipe_of(tiny_base, "sigmoid", on=str(on), reference=str(reference), trainer={**STEPS, "learning_rate": 0.0})
        held[name] = train(still, tmp_path / name, rows=ROWS, quiet=True)["metrics"]["eval_loss"]
    assert held["same"] == pytest.approx(math.log(2), abs=1e-6)
    model, tokenizer = load_model(str(tiny_base), on=str(on)).double(), load_tokenizer(str(tiny_base))
    reference = load_model(str(tiny_base), on=str(other)).double()
    assert held["other"] == pytest.approx(float(explicit_loss(model, reference, tokenizer, ROWS["eval"], 0.1)), abs=1e-5)


def test_only_the_trained_adapter_is_saved(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    other = make_adapter(tiny_base, seed=1, target_modules=["q_proj", "o_proj"], r=5)
    train(recipe_of(tiny_base, "ipo", reference=str(other), trainer=STEPS), tmp_path / "a", rows=ROWS, quiet=True)
    itself = recipe_of(tiny_base, "ipo", reference=str(tiny_base), trainer=STEPS)
    assert train(itself, tmp_path / "b", rows=ROWS, quiet=True)["reference"]["name"] == "base"  # no second copy in memory
    one, two = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)
    PeftModel.from_pretrained(parts(tiny_base)[0], tmp_path / "a")


@pytest.mark.parametrize(("loss", "measured"), [
    ("sigmoid", {"eval_rewards/accuracies"}), ("ipo", {"eval_rewards/accuracies"}), ("kto", {"eval_kl"}),
    ("orpo", {"eval_rewards/accuracies", "eval_nll_loss", "eval_log_odds_chosen"}), ("simpo", {"eval_rewards/accuracies"})])
def test_the_manifest_holds_the_metrics_of_each_loss(loss: str, measured: set[str], tiny_base: Path, tmp_path: Path) -> None:
    trainer = {**STEPS, "logging_steps": 10}
    manifest = train(recipe_of(tiny_base, loss, trainer=trainer), tmp_path / "a", rows=ROWS, quiet=True)
    assert manifest["metrics"].keys() >= measured | {"task_loss", "eval_loss", "eval_rewards/margins", "rewards/margins"}
    assert not any("runtime" in name or "per_second" in name for name in manifest["metrics"])
    assert (manifest["reference"] is None) == (loss in ("orpo", "simpo"))
