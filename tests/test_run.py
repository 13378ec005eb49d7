"""The pipeline on a tiny base: every stage kind, resuming, refusals; and the table's words against numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datakit import chat_rows, pair_rows, write_jsonl

from paft.cli import invoke
from paft.errors import UsageError
from paft.parallel import assign, gpus
from paft.provenance import content_hash, read_manifest, verify
from paft.recipe import RunRecipe, validate
from paft.report.headtohead import findings, group_of, ideal_distances, rows_of
from paft.run import check

RECIPE = """
kind: run
name: small
model: {base}
data:
  sft: {sft}
  pref: {pref}
  text: {text}
defaults:
  sft: &shared
    lora: {{r: 2, alpha: 4, targets: [q_proj, down_proj]}}
    trainer: {{max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1e-2, logging_steps: 1}}
  dpo: *shared
  joint: *shared
train:
  sft: {{objective: sft}}
  sft-l1: {{objective: sft, l1: 1e-3}}
  sft-l2: {{objective: sft, l2: 1e-2}}
  dpo: {{objective: dpo}}
  sft-dpo: {{objective: dpo, on: sft}}
  l1-dpo: {{objective: dpo, on: sft-l1}}
  mix: {{objective: joint, label: Mix}}
merge:
  ties: {{of: [sft, dpo], method: ties, parameters: {{density: 0.5}}}}
  ties-l1: {{of: [sft-l1, dpo], method: ties, parameters: {{density: 0.5}}, label: "ties, L1"}}
  slerp: {{of: [sft, dpo], method: slerp}}
  pruned: {{of: [sft, dpo], method: magnitude_prune, density_like: sft-l1}}
  shrunk: {{of: [sft, dpo], method: task_arithmetic, norm_like: sft-l1}}
  l2: {{of: [sft-l2, dpo], method: task_arithmetic}}
evaluate: {{split: test, rows: 6, generate: 2}}
"""
GROUPS = {
    "base": "base", "sft": "single", "sft-l1": "single", "sft-l2": "single", "dpo": "single", "sft-dpo": "sequential",
    "l1-dpo": "sequential", "mix": "joint", "ties": "merge", "ties-l1": "merge", "slerp": "merge", "pruned": "control",
    "shrunk": "control", "l2": "control",
}


class Pipeline:
    """One executed run and the command line that made it."""

    def __init__(self, folder: Path, base: Path) -> None:
        sft, pref = write_jsonl(folder / "chat.jsonl", chat_rows(80)), write_jsonl(folder / "pairs.jsonl", pair_rows(80))
        text = write_jsonl(folder / "text.jsonl", [{"text": "the cat is big"}, {"text": "where are they"}])
        self.recipe, self.out = folder / "small.yaml", folder / "out"
        self.recipe.write_text(RECIPE.format(base=base, sft=sft, pref=pref, text=text))

    def __call__(self, *more: str) -> int:
        return invoke(["run", str(self.recipe), "-o", str(self.out), "--workers", "1", *more])

    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())

    def made(self, kind: str) -> dict[str, tuple[int, str]]:
        """(time of the manifest, hash of the tensors) of every adapter or merge."""
        return {path.name: ((path / "paft.json").stat().st_mtime_ns, content_hash(path)) for path in (self.out / kind).iterdir()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Pipeline:
    done = Pipeline(tmp_path_factory.mktemp("run"), tiny_base)
    assert done() == 0
    return done


def test_the_report_has_a_row_for_everything(pipeline: Pipeline) -> None:
    report = pipeline.report()
    assert {"schema", "name", "model", "seed", "split", "rows", "findings", "wall_s", "adapters"} <= report.keys()
    assert (report["schema"], report["name"], report["seed"], report["split"]) == (1, "small", 0, "test")
    assert {row["id"]: row["group"] for row in report["rows"]} == GROUPS
    assert {row["id"]: row["name"] for row in report["rows"]}["ties-l1"] == "ties, L1"
    metrics = {"sft_loss", "dpo_loss", "pref_accuracy", "text_loss", "exact_match", "ideal"}
    assert all(metrics <= row.keys() for row in report["rows"])
    base = report["rows"][0]
    assert base["pref_accuracy"] == 0.5 and base["dpo_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert set(report["adapters"]) == {name for name in GROUPS if name in ("dpo", "mix") or "sft" in name or name == "l1-dpo"}
    assert report["findings"]


def test_every_file_is_there_and_is_what_its_manifest_says(pipeline: Pipeline) -> None:
    for name in ("report.json", "report.md", "tradeoff.png", "sparsity.png", "paft.json"):
        assert (pipeline.out / name).stat().st_size > 0
    artefacts = [*(pipeline.out / "adapters").iterdir(), *(pipeline.out / "merges").iterdir()]
    assert {path.name for path in artefacts} == GROUPS.keys() - {"base"}
    assert all(verify(path) == [] and (path / "README.md").is_file() for path in artefacts)
    assert not [path for path in pipeline.out.rglob(".*")]


def test_adapters_and_merges_load_in_plain_libraries(pipeline: Pipeline, tiny_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for path in (pipeline.out / "adapters").iterdir():
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        loaded = PeftModel.from_pretrained(model, path)
        assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 4
    for path in (pipeline.out / "merges").iterdir():
        _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(path).chat_template


def test_controls_have_the_density_and_the_norm_of_what_they_control(pipeline: Pipeline, tiny_base: Path) -> None:
    from paft.adapter import read_adapter
    from paft.report.sparsity import sparsity

    def moments(name: str) -> Any:
        return sparsity(read_adapter(pipeline.out / "adapters" / name)).overall.moments

    pruned = read_manifest(pipeline.out / "rescaled" / "sft-pruned-as-sft-l1")
    assert pruned
    assert pruned["recipe"]["keep_largest"] == pytest.approx(1 - moments("sft-l1").share_scaled)
    shrunk = sparsity(read_adapter(pipeline.out / "rescaled" / "sft-as-sft-l1")).overall.moments
    assert shrunk.frobenius == pytest.approx(moments("sft-l1").frobenius, rel=1e-6)
    assert shrunk.l1 / shrunk.frobenius == pytest.approx(moments("sft").l1 / moments("sft").frobenius, rel=1e-6)


def test_a_second_run_is_refused_and_resuming_keeps_what_is_finished(pipeline: Pipeline,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    adapters, rows = pipeline.made("adapters"), pipeline.report()["rows"]
    assert pipeline() == 3
    assert capsys.readouterr().err.splitlines()[-2].endswith("out is not empty")
    assert pipeline("--resume", "-q") == 0
    assert pipeline.made("adapters") == adapters
    assert pipeline.report()["rows"] == rows


def test_resuming_remakes_what_a_changed_setting_touches(pipeline: Pipeline) -> None:
    adapters, merges = pipeline.made("adapters"), pipeline.made("merges")
    assert pipeline("--resume", "-q", "--set", "train.sft-l1.l1=2e-3") == 0
    after, merged = pipeline.made("adapters"), pipeline.made("merges")
    assert {name for name in adapters if after[name][0] != adapters[name][0]} == {"sft-l1", "l1-dpo"}
    assert {name for name in merges if merged[name][1] != merges[name][1]} == {"ties-l1", "pruned", "shrunk"}
    assert pipeline("--resume", "-q") == 0  # and back: the same settings make the same bytes
    assert {name: hashed for name, (_, hashed) in pipeline.made("adapters").items()} == {n: h for n, (_, h) in adapters.items()}


def test_two_workers_make_the_same_bytes(pipeline: Pipeline) -> None:
    other = pipeline.out.with_name("side-by-side")
    assert pipeline("-o", str(other), "--workers", "2", "-q") == 0
    assert {p.name: content_hash(p) for p in (other / "adapters").iterdir()} == {
        name: made for name, (_, made) in pipeline.made("adapters").items()}


def test_sharing_the_base_makes_the_same_bytes(pipeline: Pipeline) -> None:
    other = pipeline.out.parent / "shared"
    assert pipeline("-o", str(other), "--share-base", "-q") == 0
    for name in ("sft", "sft-l1", "dpo", "mix", "sft-dpo"):
        assert content_hash(pipeline.out / "adapters" / name) == content_hash(other / "adapters" / name), name
    assert pipeline("-o", str(other), "--share-base", "--workers", "2") == 2


def test_overwrite_gives_the_old_run_back_when_the_new_one_fails(pipeline: Pipeline) -> None:
    before = pipeline.made("adapters") | pipeline.made("merges")
    assert pipeline("--overwrite", "--set", "defaults.sft.trainer.learning_rate=1e30") == 3
    assert pipeline.made("adapters") | pipeline.made("merges") == before
    assert [path.name for path in pipeline.out.parent.iterdir() if path.name.startswith(f".{pipeline.out.name}.")] == []


@pytest.mark.parametrize(("setting", "told"), [
    ("merge.ties.method=tise", "ties"), ("merge.ties.parameters={densty: 1}", "density"), ("merge.ties.weights=[1]", "weights"),
    ("train.sft.trainer={max_step: 1}", "max_steps"), ("defaults.sft.model=x", "defaults.sft.model"),
])
def test_what_cannot_work_is_refused_before_anything_is_trained(pipeline: Pipeline, capsys: pytest.CaptureFixture[str],
                                                                setting: str, told: str) -> None:
    assert pipeline("-o", str(pipeline.out) + "-new", "--set", setting) == 2
    said = capsys.readouterr().err
    assert told in said and "training" not in said.replace("no training", "")
    assert not Path(str(pipeline.out) + "-new").exists()


def test_results_go_to_stdout_and_progress_to_stderr(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline("--resume") == 0
    out, err = capsys.readouterr()
    assert "Nearest to the ideal point" in out and "next: paft" in out
    assert "kept" in err and "kept" not in out
    assert all(len(line) <= 80 or str(pipeline.out) in line for line in out.splitlines())
    assert pipeline("--resume", "--json", "-q") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["name"] == "small" and err == ""


# Recipes that cannot run


def recipe(**changed: Any) -> RunRecipe:
    parts = {"name": "r", "model": "m", "data": {"sft": "a", "pref": "b"},
             "train": {"sft": {"objective": "sft"}, "dpo": {"objective": "dpo"}},
             "merge": {"sum": {"of": ["sft", "dpo"], "method": "task_arithmetic"}}}
    return validate(RunRecipe, parts | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": {"dpo": {"objective": "dpo", "on": "sft"}, "sft": {"objective": "sft"}}}, "train.dpo.on"),
        ({"merge": {"sum": {"of": ["sft", "dp"], "method": "ties"}}}, "'dp'"),
        ({"merge": {"dpo": {"of": ["sft", "dpo"], "method": "ties"}}}, "merge.dpo"),
        ({"merge": {"../up": {"of": ["sft"], "method": "ties"}}}, "'../up'"),
        ({"merge": {"sum": {"of": ["sft"], "method": "ties", "norm_like": "sft-l1"}}}, "'sft-l1'"),
    ],
)
def test_stages_must_fit_together(changed: dict[str, Any], said: str) -> None:
    check(recipe())
    with pytest.raises(UsageError) as caught:
        check(recipe(**changed))
    assert said in caught.value.message


# The table's words


SCORES = {
    "base": {"sft_loss": 4.0, "dpo_loss": 0.7},
    "sft": {"sft_loss": 1.0, "dpo_loss": 0.9, "pref_accuracy": 0.25},
    "dpo": {"sft_loss": 5.0, "dpo_loss": 0.1, "pref_accuracy": 1.0},
    "sum": {"sft_loss": 1.3, "dpo_loss": 0.5, "pref_accuracy": 0.75},
}


def test_ideal_distances_by_hand() -> None:
    found = ideal_distances(SCORES)  # the best are 1.0 and 0.1
    assert found == pytest.approx({"base": (9 + 0.36) ** 0.5, "sft": 0.8, "dpo": 4.0, "sum": 0.5})
    assert ideal_distances({"one": {"sft_loss": 1.0}}) == {}
    assert ideal_distances({"one": {"sft_loss": 1.0}, "two": {"sft_loss": 3.0, "dpo_loss": 2.0}}) == {"two": 0.0}


def test_findings_by_hand() -> None:
    rows = rows_of(recipe(), SCORES)
    assert {row["id"]: row["group"] for row in rows} == {"base": "base", "sft": "single", "dpo": "single", "sum": "merge"}
    said = findings(rows)
    assert "sum" in said[0] and "0.50 nats" in said[0]
    assert any("Best merge: sum" in line and "preference accuracy 0.75" in line for line in said)
    assert not any("sft " in line.split(":")[0] for line in said)
    mix, other = {"name": "Mix", "group": "joint", "ideal": 0.2}, {"name": "X", "group": "merge", "ideal": 0.4}
    said = findings([*rows, mix, other])
    assert "Mix (joint), 0.20" in said[0] and any("Best merge: X" in line for line in said)
    assert findings([row for row in rows if row["group"] != "merge"]) == []


def test_group_of_each_kind() -> None:
    given = recipe(
        train={"sft": {"objective": "sft"}, "l2": {"objective": "sft", "l2": 0.1}, "dpo": {"objective": "dpo"},
               "seq": {"objective": "dpo", "on": "sft"}, "mix": {"objective": "joint"}},
        merge={"sum": {"of": ["sft", "dpo"], "method": "ties"}, "a": {"of": ["l2", "dpo"], "method": "ties"},
               "b": {"of": ["sft", "dpo"], "method": "ties", "density_like": "l2"},
               "c": {"of": ["sft", "dpo"], "method": "ties", "norm_like": "l2"}},
    )
    expected = {"base": "base", "sft": "single", "l2": "single", "dpo": "single", "seq": "sequential", "mix": "joint",
                "sum": "merge", "a": "control", "b": "control", "c": "control"}
    assert {name: group_of(name, given) for name in expected} == expected


def test_every_gpu_gets_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assign(["0", "1"], 2) == ["0", "1"]
    assert assign(["4"], 3) == ["4", "4", "4"]
    assert assign([], 2) == [None, None]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus() == ["3", "5"]
