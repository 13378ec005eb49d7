"""A pipeline whose preference stages have another loss and reference: both are part of what makes a stage the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

from paft.errors import UsageError
from paft.provenance import content_hash
from paft.recipe import RunRecipe, validate
from paft.run import _train_one, check, plan
from paft.runjob import Run

STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def pipeline(folder: Path, base: Path, **dpo: Any) -> dict[str, Any]:
    lora = {"r": 2, "targets": ["q_proj"]}
    return {"kind": "run", "name": "p", "model": str(base), "train": {"dpo": {"objective": "dpo"}},
            "data": {"sft": str(folder / "chat.jsonl"), "pref": str(folder / "pairs.jsonl")}, "evaluate": {"rows": 4},
            "defaults": {"dpo": {"lora": lora, "trainer": STEPS, **dpo}}}


def test_loss_and_reference_are_part_of_what_makes_a_stage_done(tiny_base: Path, make_adapter: AdapterFactory,
                                                                 tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(80))
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(80))
    other = make_adapter(tiny_base, seed=1)

    def recipe(**dpo: Any) -> RunRecipe:
        return validate(RunRecipe, pipeline(tmp_path, tiny_base, **dpo))

    def done(**dpo: Any) -> bool:
        return plan(recipe(**dpo), tmp_path / "out")["train"][0]["done"]

    job = Run(recipe(loss="kto", reference=str(other)), tmp_path / "out", quiet=True)
    job.read()
    manifest = _train_one(job, "dpo")
    assert manifest["reference"]["content_sha256"] == content_hash(other)
    assert done(loss="kto", reference=str(other))
    assert not any((done(loss="kto"), done(loss="kto", reference="base"), done(loss="ipo", reference=str(other))))
    (make_adapter(tiny_base, seed=2) / "adapter_model.safetensors").replace(other / "adapter_model.safetensors")
    assert not done(loss="kto", reference=str(other))


@pytest.mark.parametrize(("dpo", "said"), [({"loss": "sigmod"}, "train.dpo: there is no loss"),
                                           ({"loss": "orpo", "reference": "base"}, "train.dpo: loss orpo has no reference")])
def test_it_is_refused_before_anything_runs(dpo: Any, said: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        check(validate(RunRecipe, pipeline(tmp_path, tiny_base, **dpo)))
