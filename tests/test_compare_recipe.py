"""`paft compare RECIPE`: run with several seeds, once, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clikit import Capture
from datakit import chat_rows, pair_rows, write_jsonl

from paft.cli import invoke

RECIPE: dict[str, Any] = {"kind": "run", "name": "tiny", "seed": 4, "evaluate": {"split": "test", "rows": 6},
                          "train": {"dpo": {"objective": "dpo"}}}


def test_a_recipe_is_run_with_several_seeds_once(tmp_path: Path, tiny_base: Path, capsys: Capture) -> None:
    own = {"lora": {"r": 2, "alpha": 4}, "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}}
    sft, pref = write_jsonl(tmp_path / "s.jsonl", chat_rows(60)), write_jsonl(tmp_path / "p.jsonl", pair_rows(60))
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(json.dumps({**RECIPE, "model": str(tiny_base), "data": {"sft": str(sft), "pref": str(pref)},
                                  "defaults": {"dpo": own}}))
    line = ["compare", str(recipe), "--seeds", "2", "-o", str(out), "-q", "--workers", "1"]
    assert invoke([*line, "--dry-run"]) == 0 and not out.exists()
    assert "  seed 5: 0 of 1 trainings kept, about " in capsys.readouterr().out
    assert invoke([*line, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    adapters = [out / f"seed-{seed}" / "adapters" / "dpo" / "adapter_model.safetensors" for seed in (4, 5)]
    assert adapters[0].read_bytes() != adapters[1].read_bytes()
    before = [file.stat().st_mtime_ns for file in adapters]
    assert invoke([*line, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [file.stat().st_mtime_ns for file in adapters] == before
    assert again == first == json.loads((out / "compare.json").read_text())
    assert (first["seeds"], first["baselines"]) == ([4, 5], {"dpo": "dpo"}) and first["stages"]["dpo"]["tokens"] > 0
    assert {file.suffix for file in out.glob("compare.*")} == {".md", ".json", ".csv", ".html", ".png"}
