"""A merge in memory is the written one, bit for bit, and leaves the base as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory, save_base
from variantkit import make, save_model

from paft.errors import MismatchError, UsageError
from paft.merge.engine import merge
from paft.merge.resident import Resident, open_job
from paft.models import load_model
from paft.recipe import MergeRecipe

WAYS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weights": [1.0, 0.7]},
    "linear": {"weights": [0.3, 0.7]},
    "slerp": {"parameters": {"t": 0.3}},
    "ties": {"parameters": {"density": 0.4}},
    "ties by paper": {"parameters": {"density": 0.4}, "dialect": "paper"},  # one threshold over the model
    "dare_ties": {"parameters": {"density": 0.5}, "seed": 3},
    "by layer": {"parameters": {"weight": [{"layers": 0, "value": 0.2}, {"value": 1.0}]}},
    "bfloat16": {"weights": [1.0, 1.0], "dtype": "bfloat16"},
    "stochastic": {"weights": [1.0, 1.0], "dtype": "bfloat16", "rounding": "stochastic"},
}
NAMES = {"ties by paper": "ties", "by layer": "task_arithmetic", "bfloat16": "linear", "stochastic": "linear"}


def recipe_of(way: str, adapters: list[Path]) -> MergeRecipe:
    return MergeRecipe(method=NAMES.get(way, way), adapters=[str(path) for path in adapters], **WAYS[way])


def written(recipe: MergeRecipe, out: Path) -> dict[str, torch.Tensor]:
    said = recipe.model_dump(include={"base", "method", "parameters", "weights", "dialect", "dtype", "rounding", "seed"})
    merge(recipe.adapters, **said, out=out)
    return load_model(str(out)).state_dict()


def same(found: Any, wanted: Any) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(7, 19)[None]).logits


@pytest.fixture(scope="module")
def pair(tiny_base: Path, make_adapter: AdapterFactory) -> list[Path]:
    return [make_adapter(tiny_base, 1), make_adapter(tiny_base, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_a_merge_in_memory_is_the_written_one(way: str, pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    recipe, model = recipe_of(way, pair), load_model(str(tiny_base))
    before, job = logits(model), open_job(recipe)
    with Resident(model, job.inputs.base).merged(job) as merged:
        assert same(merged.state_dict(), written(recipe, tmp_path / "out"))
        assert torch.equal(logits(merged), logits(load_model(str(tmp_path / "out"))))
        assert not torch.equal(logits(merged), before)
    assert same(model.state_dict(), load_model(str(tiny_base)).state_dict())


def test_one_after_another_is_each_alone(tiny_base: Path, pair: list[Path], make_adapter: AdapterFactory) -> None:
    """Also where the next one touches less, or is not rounded."""
    small = make_adapter(tiny_base, 3, target_modules=["q_proj"])
    recipes = [recipe_of("bfloat16", pair), recipe_of("ties", pair), MergeRecipe(method="linear", adapters=[str(small)])]
    model = load_model(str(tiny_base))
    resident = Resident(model, open_job(recipes[0]).inputs.base)
    for recipe in recipes:
        resident.apply(open_job(recipe))
        alone, job = load_model(str(tiny_base)), open_job(recipe)
        Resident(alone, job.inputs.base).apply(job)
        assert same(model.state_dict(), alone.state_dict())
    resident.undo()
    assert same(model.state_dict(), load_model(str(tiny_base)).state_dict())


@pytest.mark.parametrize("kind", ["tied llama", "bfloat16 llama", "sharded gpt2", "gpt_neox"])
def test_every_layout_of_a_base(kind: str, tmp_path: Path) -> None:
    base, name = tmp_path / "base", kind.split()[-1]
    save_model(base, name, tied="tied" in kind, dtype=torch.bfloat16 if "bfloat16" in kind else torch.float32,
               shard="20KB" if "sharded" in kind else None)
    adapters = [str(make(base, tmp_path / f"a{seed}", seed, target_modules="all-linear")) for seed in (1, 2)]
    recipe = MergeRecipe(method="ties", adapters=adapters, parameters={"density": 0.5}, base=str(base))
    model, job = load_model(str(base)), open_job(recipe)
    with Resident(model, job.inputs.base).merged(job):
        assert same(model.state_dict(), written(recipe, tmp_path / "out"))
    assert same(model.state_dict(), load_model(str(base)).state_dict())


def test_fine_tuned_models_are_inputs_too(tiny_base: Path, pair: list[Path], tmp_path: Path) -> None:
    tuned = save_base(tmp_path / "tuned", tied=False, seed=5)
    recipe = MergeRecipe(method="linear", adapters=[str(tuned), str(pair[0])], base=str(tiny_base), weights=[0.4, 0.6])
    model, job = load_model(str(tiny_base)), open_job(recipe)
    with Resident(model, job.inputs.base).merged(job):
        assert same(model.state_dict(), written(recipe, tmp_path / "out"))
    assert same(model.state_dict(), load_model(str(tiny_base)).state_dict())


def test_a_merge_that_fails_leaves_the_base(tiny_base: Path, pair: list[Path]) -> None:
    """float16 overflows in one layer when the other is done."""
    model, weight = load_model(str(tiny_base)), [{"layers": 1, "value": 1e8}, {"value": 1.0}]
    job = open_job(MergeRecipe(method="task_arithmetic", adapters=[str(one) for one in pair], parameters={"weight": weight},
                               dtype="float16"))
    with pytest.raises(MismatchError, match="float16"):
        Resident(model, job.inputs.base).apply(job)
    assert same(model.state_dict(), load_model(str(tiny_base)).state_dict())


def test_refusals(tiny_base: Path, tiny_tied_base: Path, pair: list[Path], make_adapter: AdapterFactory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapters"):
        open_job(MergeRecipe(method="ties"))
    with pytest.raises(UsageError, match="mergekit"):
        open_job(MergeRecipe(method="ties", adapters=[str(pair[0])], engine="mergekit"))
    other = open_job(MergeRecipe(method="ties", adapters=[str(make_adapter(tiny_tied_base, 1))]))
    with pytest.raises(MismatchError, match="not over the model in memory"):
        Resident(load_model(str(tiny_base)), open_job(recipe_of("ties", pair)).inputs.base).apply(other)
    experts = save_model(tmp_path / "experts", "mixtral")  # which transformers joins into one parameter
    tuned = load_model(str(experts))
    tuned.save_pretrained(tmp_path / "tuned")
    job = open_job(MergeRecipe(method="linear", adapters=[str(tmp_path / "tuned")], base=str(experts)))
    with pytest.raises(MismatchError, match="no parameter"):
        Resident(load_model(str(experts)), job.inputs.base).apply(job)
