"""Ways of joint trainings in a run: measured on the validation split, without a trace in what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datakit import chat_rows, pair_rows, write_jsonl

from paft.adapter import read_adapter
from paft.controls import pruned, rescaled
from paft.data import content_hash as rows_hash
from paft.provenance import content_hash, read_manifest
from paft.recipe import RunRecipe, validate
from paft.report.sources import open_source
from paft.report.sparsity import sparsity
from paft.report.trainings import way
from paft.run import _train_all, _train_one
from paft.runjob import ON_THE_WAY, Run
from paft.runmerge import merge_all

METHODS: dict[str, dict[str, Any]] = {
    "mix": {}, "alright": {}, "sequential": {}, "maxright": {"estimate_optima": True}, "uft": {"lam": 0.5},
}
EVALUATIONS = 3


def recipe(folder: Path, base: Path, *, lora: dict[str, Any] | None = None, **evaluate: Any) -> RunRecipe:
    if not (folder / "chat.jsonl").exists():
        write_jsonl(folder / "chat.jsonl", chat_rows(90))
        write_jsonl(folder / "pairs.jsonl", pair_rows(90))
    shared = {"lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "down_proj"], **(lora or {})},
              "trainer": {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}}
    joint = {**shared, "trainer": {**shared["trainer"], "disable_dropout": False}}
    train = {name: {"objective": "joint", "method": name, **more} for name, more in METHODS.items()}
    return validate(RunRecipe, {
        "name": "ways", "model": str(base), "data": {"sft": str(folder / "chat.jsonl"), "pref": str(folder / "pairs.jsonl")},
        "defaults": {"sft": shared, "dpo": shared, "joint": joint}, "evaluate": {"rows": 4, **evaluate},
        "train": {"sft": {"objective": "sft"}, "l1": {"objective": "sft", "l1": 1e-2}, "dpo": {"objective": "dpo"}, **train},
        "merge": {"both": {"of": ["sft", "dpo"], "method": "ties", "density_like": "l1", "norm_like": "dpo"}}})


def job(made: RunRecipe, out: Path) -> Run:
    found = Run(made, out, quiet=True)
    found.read()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Run, Run]:
    """The trainings without a trajectory, and the joint ones with one; LoRA dropout draws random numbers in every step."""
    folder, lora = tmp_path_factory.mktemp("ways"), {"dropout": 0.1}
    jobs = (job(recipe(folder, tiny_base, lora=lora), folder / "without"),
            job(recipe(folder, tiny_base, lora=lora, trajectory=EVALUATIONS), folder / "with"))
    _train_all(jobs[0])
    for name in METHODS:
        _train_one(jobs[1], name)
    return jobs


def test_a_trajectory_changes_no_weight(two: tuple[Run, Run]) -> None:
    without, with_one = two
    for name in METHODS:
        assert content_hash(without.adapter(name)) == content_hash(with_one.adapter(name)), name


def test_it_is_measured_on_validation_rows_so_many_times(two: tuple[Run, Run]) -> None:
    without, with_one = two
    expected = {"sft_eval": rows_hash(with_one.sft["validation"][:4]), "pref_eval": rows_hash(with_one.pref["validation"][:4])}
    for name in METHODS:
        found, manifest = way(with_one.adapter(name)), read_manifest(with_one.adapter(name))
        assert list(found) == [0, 2, 4, 6] and len(found) == EVALUATIONS + 1, name
        assert all(sft > 0 and dpo > 0 for sft, dpo in found.values()) and found[0] != found[6]
        assert manifest and {key: manifest["inputs"][key] for key in expected} == expected
        assert way(without.adapter(name)) == {}
    starts = {way(with_one.adapter(name))[0] for name in METHODS}
    assert len(starts) == 1 and starts.pop()[1] == pytest.approx(0.693147, abs=1e-5)
    plain = read_manifest(without.adapter("sft"))
    assert plain and plain["inputs"].keys() == {"train"}


def test_only_what_is_joint_is_trained_again_when_it_is_turned_on(two: tuple[Run, Run]) -> None:
    without, with_one = two
    turned = Run(with_one.recipe, without.out, True, with_one.sft, with_one.pref, [], with_one.base_hash)
    assert {name for name in turned.recipe.train if not turned.is_done(name)} == set(METHODS)
    assert all(with_one.is_done(name) for name in METHODS)


def test_how_many_rows_and_when(tiny_base: Path, tmp_path: Path) -> None:
    from paft.runplan import stage_recipe

    made = recipe(tmp_path, tiny_base, trajectory=1)
    assert stage_recipe(made, "mix", tmp_path).trainer["eval_steps"] < 1  # of 1, `Trainer` would make every step
    assert "eval_steps" not in stage_recipe(made, "sft", tmp_path).trainer
    found = Run(made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"rows": None})}), tmp_path / "x")
    found.sft = found.pref = {"train": [{}], "validation": [{}] * 500, "test": [{}]}
    assert [len(rows) for rows in found.rows("joint").values()] == [1, 1, ON_THE_WAY, ON_THE_WAY]


def test_a_delta_is_pruned_first_and_rescaled_then(two: tuple[Run, Run], tiny_base: Path, tmp_path: Path) -> None:
    without, _ = two

    def measured(path: Path) -> Any:
        return sparsity(open_source(str(path), str(tiny_base))).overall.moments

    few = pruned(without.adapter("sft"), without.adapter("l1"), tmp_path, base=str(tiny_base))
    both = rescaled(few, without.adapter("dpo"), tmp_path, base=str(tiny_base))
    kept = sparsity(read_adapter(without.adapter("l1"))).overall.moments.share_scaled
    assert measured(both).frobenius == pytest.approx(measured(without.adapter("dpo")).frobenius, rel=1e-6)
    assert measured(both).zeros == measured(few).zeros > 0.9 * kept * measured(few).entries
    merge_all(without)
    assert content_hash(both) == content_hash(without.out / "rescaled" / both.name)
    stored = json.loads((without.out / "merges.json").read_text())
    entry = without.recipe.merge["both"]
    for change in ({"norm_like": None}, {"density_like": None}, {"norm_like": "l1"}):
        altered = without.recipe.model_copy(update={"merge": {"both": entry.model_copy(update=change)}})
        other = Run(altered, without.out, True, without.sft, without.pref, [], without.base_hash)
        merge_all(other)
        assert json.loads((without.out / "merges.json").read_text()) != stored
