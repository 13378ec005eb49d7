"""A stage from recipe to directory: what it writes loads in plain PEFT, repeats to the bit, and is whole or absent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trainkit import parts, pref_rows, saved, sft_rows
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from paft.adapter import CONFIG, WEIGHTS, read_adapter
from paft.data import dataset
from paft.errors import MismatchError, NotFoundError, PaftError, UsageError
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe
from paft.train import artefact, stage
from paft.train.stage import plan, train

SHORT = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0}
SFT_ROWS = {"train": sft_rows(12), "eval": sft_rows(6, seed=9)}
PREF_ROWS = {"train": pref_rows(12), "eval": pref_rows(6, seed=9)}


def sft_recipe(base: Path, **fields: Any) -> SftRecipe:
    trainer = {**SHORT, "learning_rate": 1e-2, **fields.pop("trainer", {})}
    return SftRecipe(model=str(base), lora={"r": 3, "alpha": 6, **fields.pop("lora", {})}, trainer=trainer, **fields)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(6, 40)[None]).logits


def test_the_adapter_loads_in_plain_peft_and_repeats_the_eval_loss(tiny_base: Path, tmp_path: Path) -> None:
    manifest = train(sft_recipe(tiny_base), tmp_path / "a", rows=SFT_ROWS, quiet=True)
    model, tokenizer = parts(tiny_base)
    peft = PeftModel.from_pretrained(model, tmp_path / "a")
    judge = SFTTrainer(model=peft, args=SFTConfig(output_dir=str(tmp_path / "s"), report_to="none", bf16=False),
                       processing_class=tokenizer, train_dataset=dataset(SFT_ROWS["train"]),
                       eval_dataset=dataset(SFT_ROWS["eval"]))
    assert manifest["metrics"]["eval_loss"] == pytest.approx(judge.evaluate()["eval_loss"], abs=1e-6)
    assert manifest["metrics"]["steps"] == 3
    assert {file.name for file in (tmp_path / "a").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "paft.json", "log.jsonl"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny_base), None)


def test_the_log_has_one_record_a_step_and_a_short_run_has_metrics(tiny_base: Path, tmp_path: Path) -> None:
    manifest = train(sft_recipe(tiny_base, l1=1e-4, trainer={"logging_steps": 10}), tmp_path / "a", rows=SFT_ROWS, quiet=True)
    assert {"task_loss", "l1", "share_below_1e-5", "eval_loss"} <= manifest["metrics"].keys()
    train(sft_recipe(tiny_base), tmp_path / "b", rows=SFT_ROWS, quiet=True)
    records = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]


@pytest.mark.parametrize("kind", [SftRecipe, DpoRecipe])
def test_training_on_an_adapter_saves_their_exact_sum(kind: Any, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The start model is base + on, and so is DPO's reference: its first step has no margin yet."""
    first = make_adapter(tiny_base, seed=1, target_modules=["q_proj", "down_proj"], r=2)
    recipe = kind(model=str(tiny_base), on=str(first), lora={"r": 3, "alpha": 6}, trainer={**SHORT, "learning_rate": 1e-2})
    live: list[Any] = []
    save = artefact.save
    monkeypatch.setattr(artefact, "save", lambda trainer, *rest: (live.append(trainer), save(trainer, *rest)))
    train(recipe, tmp_path / "a", rows=SFT_ROWS if kind is SftRecipe else PREF_ROWS, quiet=True)
    trainer = live[0]
    wanted = logits(trainer.model.eval())
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert (wanted - logits(PeftModel.from_pretrained(base, first))).abs().max() > 1e-3
    found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "a"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    ranks = {len(factor.A) for factor in read_adapter(tmp_path / "a").factors.values()}
    assert ranks == {3, 5}
    if kind is DpoRecipe:
        assert trainer.state.log_history[0]["rewards/margins"] == 0
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert trainer.state.log_history[1]["rewards/margins"] != 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1]}])
def test_an_adapter_that_no_sum_can_hold_is_refused_before_the_training(options: dict[str, Any], tiny_base: Path,
                                                                        make_adapter: AdapterFactory, tmp_path: Path) -> None:
    first = make_adapter(tiny_base, seed=1, target_modules=["q_proj"], **options)
    if "modules_to_save" in options:
        tensors = load_file(first / WEIGHTS)
        save_file({name: tensor + ("norm" in name) for name, tensor in tensors.items()}, first / WEIGHTS)
    recipe = SftRecipe(model=str(tiny_base), on=str(first), trainer=SHORT)
    with pytest.raises(MismatchError, match="which no sum of LoRAs can say"):
        train(recipe, tmp_path / "a", rows=SFT_ROWS, quiet=True)
    assert not (tmp_path / "a").exists()


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from paft.recipe import SftRecipe
from paft.train.stage import train
base, rows, out = sys.argv[1:]
targets = ["v_proj", "q_proj", "up_proj", "o_proj", "k_proj", "gate_proj", "down_proj"]
fields = {"model": base, "data": rows, "lora": {"r": 3, "alpha": 6, "targets": targets},
          "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}}
train(SftRecipe(**fields), Path(out) / "first", quiet=True)
train(SftRecipe(on=str(Path(out) / "first"), **fields), Path(out) / "on", quiet=True)
"""


def test_another_process_with_other_hashes_repeats_every_byte(tiny_base: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's sets, such as PEFT's target_modules, come in another order in each process."""
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(12))
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", SCRIPT, str(tiny_base), data, str(tmp_path / "there")]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["here", str(tiny_base), data, str(tmp_path / "here")])
    exec(SCRIPT, {})
    for stage_name in ("first", "on"):
        for name in (WEIGHTS, CONFIG):
            here, there = (tmp_path / place / stage_name / name for place in ("here", "there"))
            assert here.read_bytes() == there.read_bytes(), here
    config = read_adapter(tmp_path / "here" / "on").config
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["target_modules"], config["r"]) == (names, 6)


def test_seeds_repeat_and_differ(tiny_base: Path, tmp_path: Path) -> None:
    rows = {"train": sft_rows(12), "eval": []}
    hashes = [train(sft_recipe(tiny_base, seed=seed), tmp_path / str(i), rows=rows, quiet=True)["content_sha256"]
              for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(("given", "name", "revision"), [
    ("org/name", "org/name", None), ("org/name@v1.0", "org/name", "v1.0"), ("demo:a", "demo:a", None)])
def test_the_config_names_the_base_as_the_user_did(given: str, name: str, revision: str | None, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": "/root/.cache/snapshots/ab", "target_modules": ["b", "a"], "r": 3}))
    artefact.name_base(file, given)
    assert json.loads(file.read_text()) == {
        "base_model_name_or_path": name, "revision": revision, "target_modules": ["a", "b"], "r": 3}


def test_a_base_whose_path_has_an_at_sign_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    file = tmp_path / "adapter_config.json"
    file.write_text("{}")
    artefact.name_base(file, str(tmp_path / "a@b"))
    assert json.loads(file.read_text()) == {"base_model_name_or_path": str(tmp_path / "a@b"), "revision": None}


def test_a_failure_leaves_nothing_behind(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(trainer: Any, *rest: Any) -> None:
        trainer.train()
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(stage, "_run", fail)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(stage.tempfile, "tempdir", str(tmp_path / "scratch"))
    with pytest.raises(RuntimeError, match="on fire"):
        train(sft_recipe(tiny_base), tmp_path / "out" / "a", rows=SFT_ROWS, quiet=True)
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "scratch").iterdir())


def refused(kind: type[PaftError], recipe: Any, out: Path, rows: Any, *, exit_code: int) -> PaftError:
    with pytest.raises(kind) as caught:
        train(recipe, out, rows=rows, quiet=True)
    assert caught.value.exit_code == exit_code
    assert "\n" not in caught.value.message
    assert not out.exists()
    return caught.value


def test_divergence_is_an_error_at_its_step(tiny_base: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_base, trainer={"learning_rate": 1e30, "logging_steps": 100})
    error = refused(MismatchError, recipe, tmp_path / "a", SFT_ROWS, exit_code=3)
    assert "at step 2" in error.message
    assert "learning_rate" in str(error.hint)


def test_divergence_in_the_very_last_step_is_not_saved(tiny_base: Path, tmp_path: Path) -> None:
    """No later loss would tell; the factors do."""
    recipe = sft_recipe(tiny_base, trainer={"max_steps": 1, "learning_rate": float("inf")})
    assert "NaN" in refused(MismatchError, recipe, tmp_path / "a", {"train": sft_rows(4), "eval": []}, exit_code=3).message


def test_misspelt_and_reserved_options(tiny_base: Path, tmp_path: Path) -> None:
    error = refused(UsageError, sft_recipe(tiny_base, trainer={"learning_rte": 1}), tmp_path / "a", SFT_ROWS, exit_code=2)
    assert "trainer.learning_rte" in error.message and "'learning_rate'" in str(error.hint)
    error = refused(UsageError, sft_recipe(tiny_base, trainer={"seed": 1}), tmp_path / "a", SFT_ROWS, exit_code=2)
    assert "top level" in str(error.hint)
    refused(UsageError, sft_recipe(tiny_base, trainer={"optim": "adamm"}), tmp_path / "a", SFT_ROWS, exit_code=2)


@pytest.mark.parametrize(("kind", "options"), [
    (SftRecipe, {"eval_strategy": "steps"}), (SftRecipe, {"loss_type": "nil"}), (SftRecipe, {"truncation_mode": "middle"}),
    (DpoRecipe, {"loss_type": "sigmod"}), (DpoRecipe, {"f_divergence_type": "kl"})])
def test_option_values_that_trl_refuses_late_are_usage_errors(kind: Any, options: Any, tiny_base: Path, tmp_path: Path) -> None:
    recipe = kind(model=str(tiny_base), trainer={**SHORT, **options})
    rows = {"train": sft_rows(8) if kind is SftRecipe else pref_rows(8), "eval": []}
    refused(UsageError, recipe, tmp_path / "a", rows, exit_code=2)


@pytest.mark.parametrize("kind", [SftRecipe, DpoRecipe])
def test_data_that_fill_the_context_are_refused(kind: Any, tiny_base: Path, tmp_path: Path) -> None:
    """TRL drops such rows with a word at most; with none left there is nothing to train on."""
    rows = {"train": (sft_rows(8) if kind is SftRecipe else pref_rows(8)), "eval": []}
    recipe = kind(model=str(tiny_base), trainer={**SHORT, "max_length": 1})
    assert "max_length=1" in refused(MismatchError, recipe, tmp_path / "a", rows, exit_code=3).message


@pytest.mark.parametrize("targets", ["q_prj", ["q_prj"]])
def test_targets_that_match_nothing_name_the_linear_layers(targets: Any, tiny_base: Path, tmp_path: Path) -> None:
    error = refused(MismatchError, sft_recipe(tiny_base, lora={"targets": targets}), tmp_path / "a", SFT_ROWS, exit_code=3)
    assert "q_prj" in error.message and "q_proj" in str(error.hint) and "down_proj" in str(error.hint)


def test_targets_that_lora_cannot_adapt_are_refused_before_training(tiny_base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", sft_rows(4))
    recipe = sft_recipe(tiny_base, lora={"targets": ["norm", "q_proj"]}, data=data)
    assert "LlamaRMSNorm" in refused(MismatchError, recipe, tmp_path / "a", SFT_ROWS, exit_code=3).message
    with pytest.raises(MismatchError, match="LlamaRMSNorm"):
        plan(recipe, tmp_path / "a")


def test_targets_and_places_that_cannot_be_written(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PaftError) as caught:
        train(sft_recipe(tiny_base), tmp_path / "file" / "a", rows=SFT_ROWS, quiet=True)
    assert caught.value.exit_code in (3, 4, 5)
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("mine")
    with pytest.raises(MismatchError, match="not empty"):
        train(sft_recipe(tiny_base), full, rows=SFT_ROWS, quiet=True)
    assert (full / "x").read_text() == "mine"


def test_missing_model_data_and_base(tiny_base: Path, tmp_path: Path) -> None:
    assert "--model" in str(refused(UsageError, SftRecipe(), tmp_path / "a", SFT_ROWS, exit_code=2).hint)
    assert "--data" in str(refused(UsageError, SftRecipe(model=str(tiny_base)), tmp_path / "a", None, exit_code=2).hint)
    refused(NotFoundError, sft_recipe(tmp_path / "no" / "such" / "base"), tmp_path / "a", SFT_ROWS, exit_code=4)


OPTIONS = [{}, {"num_train_epochs": 2.5}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
           {"per_device_train_batch_size": 3, "dataloader_drop_last": True}, {"max_steps": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_plan_foretells_steps_and_bytes(options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    recipe = SftRecipe(model=str(tiny_base), data=write_rows(tmp_path / "d.jsonl", sft_rows(11)), lora={"r": 3}, trainer=options)
    foretold = plan(recipe, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    manifest = train(recipe, tmp_path / "a", quiet=True)
    assert foretold["steps"] == manifest["metrics"]["steps"]
    assert foretold["adapter_bytes"] == sum(4 * tensor.numel() for tensor in saved(tmp_path / "a").values())
    assert foretold["rows"] == {"train": 11, "eval": 0}


def test_the_plan_of_each_kind(tiny_base: Path, tmp_path: Path) -> None:
    sft, pref = write_rows(tmp_path / "s.jsonl", sft_rows(20)), write_rows(tmp_path / "p.jsonl", pref_rows(24))
    assert plan(DpoRecipe(model=str(tiny_base), data=pref, eval_fraction=0.3), tmp_path / "a")["rows"].keys() == {"train", "eval"}
    joint = plan(JointRecipe(model=str(tiny_base), sft_data=sft, pref_data=pref), tmp_path / "a")
    assert (joint["rows"], joint["steps"], joint["batch"]) == ({"sft": 20, "pref": 24, "sft_eval": 0, "pref_eval": 0}, 3, 8)
    with pytest.raises(UsageError, match="learning_rte"):
        plan(JointRecipe(model=str(tiny_base), sft_data=sft, pref_data=pref, trainer={"learning_rte": 1}), tmp_path / "a")
