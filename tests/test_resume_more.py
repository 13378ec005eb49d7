"""Resuming what is more than one loss over rows in memory: labelled rows, references, streams, a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_train_resume import PREF_ROWS, SFT_ROWS, STEPS, At, Killed, assert_same, killed, recipe, records
from test_train_stage import write_rows

from paft.errors import MismatchError
from paft.provenance import content_hash
from paft.recipe import DpoRecipe, SftRecipe
from paft.train import stage, work
from paft.train.stage import train

SHORT = {"num_train_epochs": 1, "max_steps": 5, "save_steps": 2, "logging_steps": 3}


def break_off(made: Any, out: Path, step: int, rows: Any, only: type | None = None) -> None:
    """Train until step ``step`` of the training whose recipe is an ``only`` (there may be one of the reference before)."""
    build = stage._build

    def dying(of: Any, *given: Any) -> Any:
        trainer = build(of, *given)
        if only is None or isinstance(of, only):
            trainer.add_callback(At(step, killed))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_build", dying)
        with pytest.raises(Killed):
            train(made, out, rows=rows, quiet=True)


@pytest.mark.parametrize("fields", [
    {"loss": "kto"}, {"loss": "orpo"}, {"loss": {"sigmoid": 1.0, "sft": 0.5}, "trainer": {"precompute_ref_log_probs": True}},
    {"loss": "ipo", "reference": "chosen-sft"}], ids=str)
def test_preference_training(fields: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    made = recipe(tiny_base, DpoRecipe, **{**fields, "trainer": {**SHORT, **fields.get("trainer", {})}})
    train(made, tmp_path / "unbroken", rows=PREF_ROWS, quiet=True)
    break_off(made, tmp_path / "a", 3, PREF_ROWS, DpoRecipe)
    train(made, tmp_path / "a", rows=PREF_ROWS, resume=True, quiet=True)
    assert_same(tmp_path / "unbroken", tmp_path / "a")
    assert (tmp_path / "a" / "reference").is_dir() is ("reference" in fields)
    assert {path.name for path in tmp_path.iterdir()} == {"unbroken", "a"}


def test_the_training_of_the_reference_resumes_too(tiny_base: Path, tmp_path: Path) -> None:
    made = recipe(tiny_base, DpoRecipe, reference="chosen-sft", trainer=SHORT, reference_sft={"save_steps": 1})
    train(made, tmp_path / "unbroken", rows=PREF_ROWS, quiet=True)
    break_off(made, tmp_path / "a", 3, PREF_ROWS, SftRecipe)
    inner = tmp_path / "a.partial" / "reference"
    assert work.newest(tmp_path / "a.partial") is None and work.step_of(work.newest(work.place(inner)) or inner) == 3
    train(made, tmp_path / "a", rows=PREF_ROWS, resume=True, quiet=True)
    assert_same(tmp_path / "unbroken" / "reference", tmp_path / "a" / "reference")
    assert_same(tmp_path / "unbroken", tmp_path / "a")


def test_another_reference_is_another_training(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    one, two = (make_adapter(tiny_base, seed) for seed in (1, 2))
    made = recipe(tiny_base, DpoRecipe, reference=str(one), trainer=SHORT)
    break_off(made, tmp_path / "a", 3, PREF_ROWS)
    (one / "adapter_model.safetensors").write_bytes((two / "adapter_model.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="begun otherwise: reference was"):
        train(made, tmp_path / "a", rows=PREF_ROWS, resume=True, quiet=True)


@pytest.mark.parametrize(("step", "goes_on_from"), [(4, 4), (8, 4)])
def test_a_stream(step: int, goes_on_from: int, tiny_base: Path, tmp_path: Path) -> None:
    """Five and a half steps read it once; in the second reading no place to go on from is kept."""
    data = write_rows(tmp_path / "rows.jsonl", SFT_ROWS["train"])
    made = SftRecipe(model=str(tiny_base), data=data, streaming=True, lora={"r": 3, "dropout": 0.2},
                     trainer={**STEPS, **SHORT, "max_steps": 9})
    train(made, tmp_path / "unbroken", quiet=True)
    break_off(made, tmp_path / "a", step, None)
    assert work.step_of(work.newest(tmp_path / "a.partial") or tmp_path) == goes_on_from
    train(made, tmp_path / "a", resume=True, quiet=True)
    assert_same(tmp_path / "unbroken", tmp_path / "a")


@pytest.mark.parametrize("reference", [None, "chosen-sft"])
def test_dpo_of_a_whole_model(reference: str | None, tiny_base: Path, tmp_path: Path) -> None:
    made = DpoRecipe(model=str(tiny_base), full=True, l1=1e-5, reference=reference,
                     trainer={**STEPS, **SHORT, "learning_rate": 1e-3})
    train(made, tmp_path / "unbroken", rows=PREF_ROWS, quiet=True)
    break_off(made, tmp_path / "a", 3, PREF_ROWS, DpoRecipe)
    train(made, tmp_path / "a", rows=PREF_ROWS, resume=True, quiet=True)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "unbroken")
    assert records(tmp_path / "a") == records(tmp_path / "unbroken")
    first = records(tmp_path / "a")[0]
    assert (first["rewards/margins"] != 0) and (tmp_path / "a" / "reference" / "config.json").is_file() is bool(reference)
