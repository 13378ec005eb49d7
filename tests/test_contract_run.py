"""What the run of a training (`paft.train.keeper`, `stage`, `options`) builds on in transformers, TRL and PEFT."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from test_train_penalised import dpo_trainer, sft_trainer
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer, SFTTrainer
from trl.trainer import base_trainer

from paft.train.keeper import METRICS, NUMBERS


def test_the_loop_sets_its_sums_before_on_train_begin() -> None:
    """Keeper.on_train_begin overwrites them: what is set later would be lost."""
    source = inspect.getsource(Trainer._inner_training_loop)
    begin = source.index("callback_handler.on_train_begin")
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step"):
        assert 0 < source.index(f"self.{name} = ") < begin, name
    assert "_tr_loss += " in inspect.getsource(Trainer._run_epoch), "Keeper fills the tensor in place"


@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
def test_a_trainer_counts_where_the_keeper_looks(make: Any, tiny_base: Path, tmp_path: Path) -> None:
    trainer = make(tiny_base, tmp_path)
    trainer.train()
    assert all(hasattr(trainer, name) for name in NUMBERS), "Keeper saves and restores them"
    found = [name for name in METRICS if hasattr(trainer, name)]
    assert found == ["_metrics"] and set(trainer._metrics) == {"train", "eval"}


def test_a_checkpoint_says_whether_it_is_the_last() -> None:
    assert set(TrainerControl(should_training_stop=True).state()["args"]) >= {"should_training_stop", "should_save"}
    source = inspect.getsource(Trainer._save_checkpoint)
    assert "self.callback_handler.callbacks + [self.control]" in source and "stateful_callbacks[cb_name]" in source, (
        "work._at_the_end reads stateful_callbacks.TrainerControl of trainer_state.json")


def test_checkpoints_are_complete_before_on_save_and_rotate_by_our_call() -> None:
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self._save_checkpoint(") < source.index("callback_handler.on_save("), "Keeper.on_save comes last"
    assert list(inspect.signature(rotate_checkpoints).parameters)[:4] == [
        "output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"]


def test_callbacks_with_state_are_restored_only_if_asked() -> None:
    field = TrainingArguments.__dataclass_fields__["restore_callback_states_from_checkpoint"]
    assert field.default is False, "trainer_config asks for it: early stopping counts across processes"


def test_early_stopping_takes_patience_and_threshold_and_stops_on_evaluate() -> None:
    assert list(inspect.signature(EarlyStoppingCallback.__init__).parameters)[1:3] == [
        "early_stopping_patience", "early_stopping_threshold"], "stage._run gives them by position"
    assert "best_global_step" in TrainerState.__dataclass_fields__, "stage._metrics tells it as best_step"


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer])
def test_trl_narrows_the_adapter_of_a_quantised_model(kind: Any) -> None:
    source = inspect.getsource(kind.__init__)
    assert "if _is_quantized_model:" in source and "param.data.to(torch.bfloat16)" in source, "else stage._widen has no use"


@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
def test_no_trainer_tells_trl_of_itself(make: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **given: told.append(given))
    monkeypatch.delenv("CI", raising=False)
    make(tiny_base, tmp_path)
    assert told == []
    assert "send_telemetry(" in inspect.getsource(base_trainer._BaseTrainer._send_telemetry), "Penalised overrides it"


def test_a_dpo_of_a_whole_model_can_keep_what_the_model_said_first() -> None:
    source = inspect.getsource(DPOTrainer.__init__)
    assert "args.precompute_ref_log_probs and not self.is_fsdp_enabled" in source, "dpo.build: no second model is loaded"
