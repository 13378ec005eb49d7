"""Reference log-probabilities computed once: the same run, in memory, by default where it saves work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import AdapterFactory
from preferencekit import ours, recipe_of
from test_train_reference import laid_on
from trainkit import distance, factors, identical, parts, pref_rows
from trl.trainer.dpo_config import DPOConfig

from paft.data import dataset
from paft.errors import UsageError
from paft.train.dpo import PenalisedDPOTrainer
from paft.train.options import lora_config, trainer_config
from paft.train.precompute import precompute
from paft.train.reference import Reference

EPOCHS = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0}
COLUMNS = {"ipo": {"ref_chosen_logps", "ref_rejected_logps"}, "kto": {"ref_logps", "ref_KL_logps"},
           "apo_zero_unpaired": {"ref_logps"}}
BOTH = pytest.mark.parametrize("loss", COLUMNS)


def added(trainer: Any, rows: str = "train_dataset") -> set[str]:
    return {name for name in getattr(trainer, rows).column_names if name.startswith("ref_")}


@BOTH
@pytest.mark.parametrize("kind", ["base", "adapter", "model"])
def test_the_run_is_the_same_to_the_bit_where_batches_are(loss: str, kind: str, tiny_base: Path, make_adapter: AdapterFactory,
                                                          tmp_path: Path) -> None:
    """In fixed order a row meets the same padding in both; otherwise the last bits differ."""
    reference = {"base": Reference(), "adapter": laid_on(make_adapter(tiny_base, seed=3)),
                 "model": Reference(model=str(tiny_base), record={"name": "x"})}[kind]

    def run(once: bool, order: str) -> Any:
        trainer = ours(tiny_base, tmp_path, loss, reference=reference, held=6, trainer={
            **EPOCHS, "precompute_ref_log_probs": once, "train_sampling_strategy": order, "per_device_eval_batch_size": 4})
        assert added(trainer) == added(trainer, "eval_dataset") == (COLUMNS[loss] if once else set())
        assert (trainer.ref_model is None) == (once or kind != "model")
        trainer.train()
        return factors(trainer), trainer.evaluate()["eval_loss"]

    (once, held), (each, held_each) = (run(flag, "sequential") for flag in (True, False))
    assert identical(once, each) and held == held_each
    if loss == "ipo" and kind == "adapter":
        (once, held), (each, held_each) = (run(flag, "random") for flag in (True, False))
        assert distance(once, each) < 1e-4 and held == pytest.approx(held_each, rel=1e-5)


@pytest.mark.parametrize(("options", "second", "expected"), [
    ({"num_train_epochs": 1}, False, False), ({"num_train_epochs": 1}, True, True), ({"num_train_epochs": 1.5}, False, True),
    ({"max_steps": 1}, True, False), ({"max_steps": 2}, True, True), ({"max_steps": 2}, False, False),
    ({"max_steps": 3}, False, True),
    ({"num_train_epochs": 3, "precompute_ref_log_probs": False}, True, False),
    ({"max_steps": 1, "precompute_ref_log_probs": True}, False, True)])
def test_it_is_the_default_where_it_saves_work(options: dict[str, Any], second: bool, expected: bool, tiny_base: Path,
                                               tmp_path: Path) -> None:
    reference = Reference(model=str(tiny_base), record={"name": "x"}) if second else None
    trainer = ours(tiny_base, tmp_path, "ipo", reference=reference, trainer={"per_device_train_batch_size": 4, **options})
    assert bool(added(trainer)) is expected is trainer.precompute_ref_logps


def test_nothing_is_kept_on_the_disk(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    trainer = ours(tiny_base, tmp_path, "ipo", trainer=EPOCHS)
    assert added(trainer) and trainer.train_dataset.cache_files == []
    assert not list((tmp_path / "tmp").rglob("*"))


def test_another_reference_gives_other_numbers(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    one, two = (ours(tiny_base, tmp_path, "ipo", reference=laid_on(make_adapter(tiny_base, seed=seed)), trainer=EPOCHS)
                for seed in (1, 2))
    assert one.train_dataset["prompt_ids"] == two.train_dataset["prompt_ids"]
    assert one.train_dataset["ref_chosen_logps"] != two.train_dataset["ref_chosen_logps"]


def test_streamed_rows_keep_the_pass_in_each_step(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_base, "sigmoid", trainer={"max_steps": 9})
    model, tokenizer = parts(tiny_base)
    trainer = PenalisedDPOTrainer(
        model=model, args=trainer_config(DPOConfig, recipe, str(tmp_path)), processing_class=tokenizer,
        train_dataset=dataset(pref_rows(8)).to_iterable_dataset(), peft_config=lora_config(recipe.lora))
    assert precompute(trainer, None) is False and not trainer.precompute_ref_logps
    with pytest.raises(UsageError, match="not possible for streamed rows"):
        precompute(trainer, True)


def test_the_dropout_of_the_base_is_off(tiny_base: Path, tmp_path: Path) -> None:
    dropping = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    still, shaken = (ours(dropping, tmp_path, "ipo", trainer={"max_steps": 1, "disable_dropout": False}) for _ in range(2))
    shaken.model.train()
    for trainer in (still, shaken):
        precompute(trainer, True, quiet=True)
    assert still.train_dataset["ref_chosen_logps"] == shaken.train_dataset["ref_chosen_logps"]


def test_the_option_is_true_or_false(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="precompute_ref_log_probs is 'maybe', which is no bool"):
        ours(tiny_base, tmp_path, "ipo", trainer={"precompute_ref_log_probs": "maybe"})
