"""A run behind a URL: the results of one on a disk; another machine goes on with it and makes nothing again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clikit import Capture
from datakit import chat_rows, pair_rows, write_jsonl

from paft.cli import invoke
from paft.executor import Executor
from paft.recipe import RunRecipe
from paft.runjob import Run
from paft.runstore import publish, staged
from paft.store import Store, lease

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "one"))


def recipe_of(folder: Path, base: Path, **trainer: object) -> str:
    own = {"lora": {"r": 2, "alpha": 4},
           "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, **trainer}}
    sft, pref = write_jsonl(folder / "s.jsonl", chat_rows(60)), write_jsonl(folder / "p.jsonl", pair_rows(60))
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps({
        "kind": "run", "name": "tiny", "model": str(base), "data": {"sft": f"file://{sft}", "pref": str(pref)},
        "defaults": {"sft": own, "dpo": own}, "evaluate": {"split": "test", "rows": 6},
        "train": {"sft": {"objective": "sft"}, "dpo": {"objective": "dpo"}, "both": {"objective": "dpo", "on": "sft"}},
        "merge": {"ties": {"of": ["sft", "dpo"], "method": "ties", "parameters": {"density": 0.5}},
                  "pruned": {"of": ["sft", "dpo"], "method": "linear", "density_like": "dpo"}}}))
    return str(recipe)


def weights(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.safetensors"))}


def test_a_run_behind_a_url_is_one_on_a_disk_and_goes_on_anywhere(tiny_base: Path, tmp_path: Path, capsys: Capture,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    line, bucket = ["run", recipe_of(tmp_path, tiny_base), "-q", "--json", "--workers", "1", "-o"], tmp_path / "bucket" / "run"
    assert invoke([*line, str(tmp_path / "disk")]) == 0
    assert invoke([*line, f"file://{bucket}"]) == 0, capsys.readouterr().err
    assert weights(bucket) == weights(tmp_path / "disk") and len(weights(bucket)) == 6
    rows = [json.loads((place / "report.json").read_text())["rows"] for place in (tmp_path / "disk", bucket)]
    assert rows[0] == rows[1] and (bucket / "tradeoff.png").is_file()
    assert invoke(["verify", f"file://{bucket}"]) == 0
    assert invoke(["search", str(tmp_path / "disk"), "--trials", "3", "-q"]) == 0
    assert invoke(["search", f"file://{bucket}", "--trials", "3", "-q"]) == 0
    found = [place.with_name(f"{place.name}-search") / "front.json" for place in (tmp_path / "disk", bucket)]
    fronts = [json.loads(file.read_text()) for file in found]
    assert fronts[0]["front"] == fronts[1]["front"] and fronts[1]["study"] == f"file://{bucket}-search.journal"
    written = {file: file.stat().st_mtime_ns for file in bucket.rglob("*") if file.parent.name in ("sft", "dpo", "both", "ties")}
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "two"))
    capsys.readouterr()
    assert invoke([*line, f"file://{bucket}", "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows[0]
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert invoke([*line, f"file://{bucket}", "--resume", "--set", "train.dpo.beta=0.3"]) == 0
    remade = {file.parent.name for file in written if file.stat().st_mtime_ns != written[file]}
    assert remade == {"dpo", "ties"}  # SFT is untouched, and so is what rests on it alone


def test_a_url_where_something_is_stays_as_it_is(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    line, bucket = ["run", recipe_of(tmp_path, tiny_base), "-q", "-o", f"file://{tmp_path}/bucket"], tmp_path / "bucket"
    bucket.mkdir()
    (bucket / "thesis.tex").write_text("my work")
    assert invoke(line) == 3 and "--overwrite" in capsys.readouterr().err
    assert invoke([*line, "--overwrite", "--set", "data.sft=nowhere.jsonl"]) == 4  # found out before anything goes
    assert (bucket / "thesis.tex").read_text() == "my work" and len(list(bucket.iterdir())) == 1


def test_seeds_behind_a_url_are_compared_anywhere(tiny_base: Path, tmp_path: Path, capsys: Capture,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/bucket"
    few = ["--set", "evaluate.rows=2", "--set", 'train={"sft":{"objective":"sft"},"dpo":{"objective":"dpo"}}']
    assert invoke(["compare", recipe_of(tmp_path, tiny_base), "--seeds", "2", *few, "-q", "--json", "-o", url]) == 0
    here = json.loads(capsys.readouterr().out)
    assert [row["runs"] for row in here["rows"]] == [2] * 5
    assert {"compare.md", "compare.html", "seed-0", "seed-1"} <= {path.name for path in (tmp_path / "bucket").iterdir()}
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "two"))
    assert invoke(["compare", f"{url}/seed-0", f"{url}/seed-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == here["rows"]


def test_a_machine_that_is_lost_has_left_its_last_checkpoint(tiny_base: Path, tmp_path: Path, capsys: Capture,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    url, partial = f"file://{tmp_path}/bucket", "adapters/both.partial"
    recipe = recipe_of(tmp_path, tiny_base, max_steps=400, save_strategy="steps", save_steps=5)
    line = [sys.executable, "-m", "paft", "run", recipe, "--workers", "1", "--resume", "--set", "evaluate.rows=2",
            "--set", "defaults.sft.trainer.max_steps=2", "-o", url,
            "--set", 'merge={"one":{"of":["sft","dpo"],"method":"linear"}}']
    lost = {**os.environ, "PAFT_CACHE": str(tmp_path / "lost")}
    command = subprocess.Popen(line, cwd=ROOT, env=lost, stderr=subprocess.PIPE, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while f"{partial}" not in Store(url).names():
            assert time.monotonic() < end and command.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(command.pid, signal.SIGKILL)
        command.communicate()
    shutil.rmtree(tmp_path / "lost")
    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    capsys.readouterr()
    code, said = invoke(line[3:]), capsys.readouterr().err
    assert code == 0 and "resuming at step" in said and said.count("kept") == 2, said
    assert "adapters/both" in Store(url).names() and partial not in Store(url).names()


def test_every_score_is_behind_the_url_when_a_node_has_ended(tmp_path: Path) -> None:
    """Also those since the last look; and the driver's older copy does not replace them."""
    store = Store(f"file://{tmp_path}/bucket")
    job = Run(RunRecipe.model_construct(), store.here, store=store, executor=Executor("ray"))

    def measure(there: Run, name: str) -> str:
        there.out.mkdir(parents=True, exist_ok=True)
        (there.out / "scores.json").write_text("{}")
        return name

    assert staged(job, measure, makes="")("evaluate") == "evaluate"
    (store.here / "scores.json").write_text("older")
    publish(job)
    assert (tmp_path / "bucket" / "scores.json").read_text() == "{}"
