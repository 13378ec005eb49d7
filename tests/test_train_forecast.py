"""The forecast of a training's seconds counts the products that it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_train_stage import write_rows
from trainkit import pref_rows, sft_rows

from paft.models import parameters
from paft.recipe import DpoRecipe, JointRecipe, SftRecipe
from paft.train import forecast
from paft.train.stage import plan, train

SIZE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 5}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    sft, pref = sft_rows(30, answer=None), pref_rows(30)
    return {"sft": write_rows(tmp_path / "s.jsonl", sft), "pref": write_rows(tmp_path / "p.jsonl", pref)}


def work(recipe: Any, tmp_path: Path, patch: pytest.MonkeyPatch) -> float:
    """FLOP a step and parameter."""
    patch.setattr(forecast, "_rate", lambda: 1 / forecast.REACHED)
    patch.setattr(forecast, "OVERHEAD", 0.0)
    return plan(recipe, tmp_path / "x", quiet=True)["seconds"] / recipe.trainer["max_steps"] / parameters(Path(recipe.model))


def test_tokens_and_passes_are_counted(
    tiny_base: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: dict[str, Any] = {"model": str(tiny_base), "trainer": SIZE}
    sft = work(SftRecipe(**model, data=files["sft"]), tmp_path, monkeypatch)
    longer: dict[str, Any] = {"model": str(tiny_base), "trainer": {**SIZE, "max_steps": 200}, "method": "alright", "lam": 0.0}
    recipe = JointRecipe(**longer, sft_data=files["sft"], pref_data=files["pref"])
    tokens = train(recipe, tmp_path / "a", quiet=True)["metrics"]["tokens"] / 200  # of a step of six rows
    assert sft == pytest.approx(4 * tokens, rel=0.02)
    dpo = work(DpoRecipe(**model, data=files["pref"]), tmp_path, monkeypatch)
    orpo = work(DpoRecipe(**model, data=files["pref"], loss="orpo"), tmp_path, monkeypatch)  # type: ignore[arg-type]
    assert dpo == pytest.approx(1.5 * orpo)  # the reference
    assert work(SftRecipe(**model, data=files["sft"], full=True), tmp_path, monkeypatch) == pytest.approx(1.5 * sft)
    both = {"sft_data": files["sft"], "pref_data": files["pref"], "lam": 0.25}
    assert work(JointRecipe(**model, **both, method="alright"), tmp_path, monkeypatch) == pytest.approx(0.25 * dpo + 0.75 * sft)
    assert work(JointRecipe(**model, **both, method="mix"), tmp_path, monkeypatch) == pytest.approx(dpo + sft)
    wide = {**both, "method": "mix", "sft_batch_size": 6}
    assert work(JointRecipe(**model, **wide), tmp_path, monkeypatch) == pytest.approx(dpo + 3 * sft)
    uft = {**both, "method": "uft", "lam": 1.0}  # a pair is two of its rows
    assert work(JointRecipe(**model, **uft), tmp_path, monkeypatch) == pytest.approx(0.5 * dpo)
