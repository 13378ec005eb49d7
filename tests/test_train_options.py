"""The `lora` section, early stopping, and what of `trainer` is checked before TRL sees it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_train_resume import Killed, assert_same, die_at, killed
from test_train_stage import SFT_ROWS, logits, refused, sft_recipe, write_rows
from trainkit import saved, sft_rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from paft.errors import MismatchError, ResourceError, UsageError
from paft.merge.engine import merge
from paft.recipe import SftRecipe, load
from paft.train import artefact
from paft.train.checks import keep_reports_quiet
from paft.train.stage import plan, train

LORA = {
    "dora": {"dora": True}, "rslora": {"rslora": True}, "exclude": {"exclude": ["down_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 7.5}},
    "one block": {"targets": ["q_proj", "up_proj"], "layers": [1]}, "regex": {"targets": r".*\.1\.self_attn\.[qv]_proj"},
    "modules_to_save": {"modules_to_save": ["norm"], "dora": True}, "bias": {"bias": "all"},
    "embedding": {"targets": ["embed_tokens", "q_proj"]},
    "gaussian": {"init": "gaussian"}, "orthogonal": {"init": "orthogonal", "r": 4},
}


@pytest.fixture(scope="module")
def biased(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with biases in its attention."""
    path = tmp_path_factory.mktemp("biased") / "base"
    config = LlamaConfig.from_pretrained(tiny_base, attention_bias=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((tiny_base / name).read_bytes())
    return path


@pytest.mark.parametrize("name", LORA)
def test_what_is_saved_is_what_was_trained(name: str, tiny_base: Path, biased: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain PEFT, and merged by paft: a variant that lost a tensor on the way would differ."""
    base = biased if name == "bias" else tiny_base
    live: list[Any] = []
    save = artefact.save
    monkeypatch.setattr(artefact, "save", lambda trainer, *rest: (live.append(trainer), save(trainer, *rest)))
    train(sft_recipe(base, lora=LORA[name], l1=1e-4), tmp_path / "a", rows={"train": sft_rows(12), "eval": []}, quiet=True)
    wanted = logits(live[0].model.eval())
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (wanted - logits(plain)).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path / "a")), wanted, rtol=1e-5, atol=1e-5)
    merge([str(tmp_path / "a")], base=str(base), method="linear", parameters={}, weights=None,
          out=tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-4)


def test_each_option_of_lora_reaches_peft(tiny_base: Path, tmp_path: Path) -> None:
    lora = {**LORA["patterns"], "dora": True, "rslora": True, "layers": [1], "targets": ["q_proj", "up_proj"]}
    train(sft_recipe(tiny_base, lora=lora), tmp_path / "a", rows={"train": sft_rows(8), "eval": []}, quiet=True)
    shapes = {name.removeprefix("base_model.model.model.layers."): tuple(t.shape) for name, t in saved(tmp_path / "a").items()}
    assert shapes == {
        "1.self_attn.q_proj.lora_A.weight": (5, 32), "1.self_attn.q_proj.lora_B.weight": (32, 5),
        "1.self_attn.q_proj.lora_magnitude_vector": (32,), "1.mlp.up_proj.lora_A.weight": (3, 32),
        "1.mlp.up_proj.lora_B.weight": (48, 3), "1.mlp.up_proj.lora_magnitude_vector": (48,)}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["alpha_pattern"]) == (True, {r"layers\.1\.mlp\.up_proj": 7.5})


@pytest.mark.parametrize(("lora", "said"), [
    ({"rank_pattern": {"q_prj": 2}}, "'q_prj' matches none of the 14 adapted modules"),
    ({"alpha_pattern": {"layers.2.*": 2.0}}, "alpha_pattern: 'layers.2.*' matches none"),
    ({"layers": [7], "targets": ["q_proj"]}, "match no module"),
    ({"modules_to_save": ["nrm"]}, "modules_to_save: no module's name ends in 'nrm'"),
    ({"targets": ["q_proj", "v_prj"]}, "targets: no module's name ends in 'v_prj'"),
    ({"exclude": ["proj"]}, "exclude: no module's name ends in 'proj'")])
def test_what_matches_no_module_is_refused_before_training(lora: Any, said: str, tiny_base: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_base, lora=lora, data=write_rows(tmp_path / "d.jsonl", sft_rows(8)))
    assert said in refused(MismatchError, recipe, tmp_path / "a", SFT_ROWS, exit_code=3).message
    with pytest.raises(MismatchError):
        plan(recipe, tmp_path / "a")


@pytest.mark.parametrize("lora", [{"dora": True}, {"modules_to_save": ["norm"]}, {"bias": "all"}])
def test_what_no_sum_can_hold_does_not_go_with_on(lora: Any, tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_base, lora=lora, on=str(make_adapter(tiny_base, 1)))
    assert "--on" in refused(UsageError, recipe, tmp_path / "a", SFT_ROWS, exit_code=2).message


def test_a_broken_regex_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("kind: train-sft\nlora:\n  targets: '(q_proj'\n")
    with pytest.raises(UsageError, match=r"r\.yaml:3: lora\.targets: '\(q_proj' is no regular expression"):
        load(SftRecipe, tmp_path / "r.yaml")


RISES = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 12, "eval_steps": 1, "num_train_epochs": 4}


def evaluations(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record and "train_runtime" not in record}


def test_early_stopping_keeps_the_best_step(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sft_recipe(tiny_base, lora={"dropout": 0.1}, trainer=RISES, early_stopping={"patience": 2})
    manifest = train(recipe, tmp_path / "a", rows=SFT_ROWS, quiet=True)
    seen, metrics = evaluations(tmp_path / "a"), manifest["metrics"]
    best = int(metrics["best_step"])
    assert metrics["steps"] == best + 2 < 12, "the test needs a loss that rises"
    assert metrics["eval_loss"] == pytest.approx(min(seen.values()), abs=1e-6) and min(seen, key=seen.__getitem__) == best
    until = sft_recipe(tiny_base, lora={"dropout": 0.1}, trainer={**RISES, "max_steps": best}, early_stopping={"patience": 2})
    train(until, tmp_path / "b", rows=SFT_ROWS, quiet=True)
    assert all(torch.equal(saved(tmp_path / "b")[name], tensor) for name, tensor in saved(tmp_path / "a").items())
    with monkeypatch.context() as patch:  # killed between the best step and the stop: the count goes on
        die_at(best + 1, killed, patch.setattr)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "c", rows=SFT_ROWS, quiet=True)
    train(recipe, tmp_path / "c", rows=SFT_ROWS, resume=True, quiet=True)
    assert_same(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("fields", [{"early_stopping": {}}, {"trainer": {"load_best_model_at_end": True}},
                                    {"trainer": {"eval_strategy": "epoch"}}])
def test_a_judge_needs_evaluation_data(fields: Any, tiny_base: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_base, data=write_rows(tmp_path / "d.jsonl", sft_rows(8)), **fields)
    error = refused(UsageError, recipe, tmp_path / "a", None, exit_code=2)
    assert "needs evaluation data" in error.message and "--eval-fraction" in str(error.hint)
    with pytest.raises(UsageError):
        plan(recipe, tmp_path / "a")


@pytest.mark.parametrize(("option", "value", "said", "hint"), [
    ("learning_rate", "fast", "is 'fast', which is no float", ""), ("bf16", "yes", "no bool", ""),
    ("save_steps", True, "is True", ""), ("report_to", [1], "report_to", ""), ("output_dir", "x", "paft sees to it", "-o DIR"),
    ("resume_from_checkpoint", "x", "paft sees to it", "--resume"), ("hub_token", "x", "paft sees to it", "hf upload"),
    ("save_only_model", True, "paft sees to it", "save_total_limit"), ("warmup_ratio", 0.1, "not an option", "warmup_steps"),
    ("lr_scheduler_type", "cosin", "SchedulerType", ""), ("beta", 0.1, "not an option", "adam_beta")])
def test_options_are_refused_in_one_line(option: str, value: Any, said: str, hint: str, tiny_base: Path, tmp_path: Path) -> None:
    error = refused(UsageError, sft_recipe(tiny_base, trainer={option: value}), tmp_path / "a", SFT_ROWS, exit_code=2)
    assert f"trainer.{option}" in error.message or option == "lr_scheduler_type"
    assert said in error.message and hint in str(error.hint)


def test_a_report_from_a_package_that_is_missing(tiny_base: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_base, trainer={"report_to": "tensorboard"})
    assert "install" in refused(ResourceError, recipe, tmp_path / "a", SFT_ROWS, exit_code=5).message


@pytest.mark.parametrize(("report", "given", "mode"), [
    ("wandb", {}, "offline"), (["tensorboard", "wandb"], {}, "offline"), ("none", {}, None), (None, {}, None),
    ("wandb", {"WANDB_API_KEY": "k", "HF_HUB_OFFLINE": "0"}, None), ("wandb", {"WANDB_API_KEY": "k"}, "offline"),
    ("wandb", {"WANDB_MODE": "online"}, "online")])
def test_wandb_never_asks_for_a_login(report: Any, given: dict[str, str], mode: str | None, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NETRC": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1", **given}.items():
        monkeypatch.setenv(name, value)
    if "WANDB_MODE" not in given:
        monkeypatch.setenv("WANDB_MODE", "")  # so that it is put back
        monkeypatch.delenv("WANDB_MODE")
    keep_reports_quiet(report)
    assert os.environ.get("WANDB_MODE") == mode


def test_max_length_is_cut_to_the_positions_of_the_model(tiny_base: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"train": sft_rows(8), "eval": []}
    for given, kept in ((4096, 128), (None, 128), (64, 64)):
        manifest = train(sft_recipe(tiny_base, trainer={"max_length": given, "max_steps": 1}), tmp_path / str(given), rows=rows)
        said = capsys.readouterr().err
        assert (manifest["max_length"], "cut to 128" in said) == (kept, kept != given)
    assert train(sft_recipe(tiny_base, trainer={"max_steps": 1}), tmp_path / "b", rows=rows)["max_length"] == 128
    assert "max_length" not in capsys.readouterr().err
