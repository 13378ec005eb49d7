"""A pipeline whose preference stages have another loss and reference: both are part of what makes a stage the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

from paft.cli import invoke
from paft.errors import UsageError
from paft.provenance import content_hash, read_manifest
from paft.recipe import RunRecipe, validate
from paft.run import check

STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def pipeline(folder: Path, base: Path, **dpo: Any) -> dict[str, Any]:
    lora = {"r": 2, "targets": ["q_proj"]}
    return {"kind": "run", "name": "p", "model": str(base), "train": {"dpo": {"objective": "dpo"}},
            "data": {"sft": str(folder / "chat.jsonl"), "pref": str(folder / "pairs.jsonl")}, "evaluate": {"rows": 4},
            "defaults": {"dpo": {"lora": lora, "trainer": STEPS, **dpo}}}


def test_loss_and_reference_make_the_stage_again(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(80))
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(80))
    other, out = make_adapter(tiny_base, seed=1), tmp_path / "out"

    def made(**dpo: Any) -> int:
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline(tmp_path, tiny_base, **dpo)))
        assert invoke(["run", str(tmp_path / "p.yaml"), "-o", str(out), "--workers", "1", "--resume", "-q"]) == 0
        return (out / "adapters" / "dpo" / "paft.json").stat().st_mtime_ns

    times = [made(), made(loss="ipo"), made(loss="kto"), made(loss="kto", reference=str(other))]
    assert len(set(times)) == 4
    assert made(loss="kto", reference=str(other)) == times[-1]
    manifest = read_manifest(out / "adapters" / "dpo")
    assert manifest and manifest["reference"]["content_sha256"] == content_hash(other)
    (make_adapter(tiny_base, seed=2) / "adapter_model.safetensors").replace(other / "adapter_model.safetensors")
    assert made(loss="kto", reference=str(other)) not in times


@pytest.mark.parametrize(("dpo", "said"), [({"loss": "sigmod"}, "train.dpo: there is no loss"),
                                           ({"loss": "orpo", "reference": "base"}, "train.dpo: loss orpo has no reference")])
def test_it_is_refused_before_anything_runs(dpo: Any, said: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        check(validate(RunRecipe, pipeline(tmp_path, tiny_base, **dpo)))
