"""Cards: a header the hub can read, the recipe as it was, the numbers as a table."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from paft.card import adapter_card, model_card

RECIPE = {"kind": "merge", "method": "ties", "parameters": {"density": 0.5, "note": "a: b # c"}, "weights": None}


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_model_card() -> None:
    card = model_card("A + B", base="org/name@abc", recipe=RECIPE)
    assert header(card) == {
        "base_model": "org/name",
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["paft", "merge"],
    }
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == RECIPE


@pytest.mark.parametrize("base", [None, "name", "/home/me/name", "./org/name", "demo:a", "../name"])
def test_what_is_no_hub_id_stays_out_of_the_header(base: str | None) -> None:
    assert "base_model" not in header(model_card("T", base=base, recipe={}))


def test_adapter_card_with_numbers() -> None:
    rows = [{"method": "ties", "accuracy": 0.123456}, {"method": "a|b", "loss": 2.0}]
    card = adapter_card("T", base="org/name", recipe={}, metrics=rows, text="What it is.")
    assert header(card)["library_name"] == "peft"
    assert header(card)["base_model_relation"] == "adapter"
    assert "What it is." in card
    assert "| method | accuracy | loss |\n|---|---|---|\n| ties | 0.1235 |  |\n| a\\|b |  | 2 |" in card


def test_a_hostile_name_stays_a_name() -> None:
    name = "<script>alert(1)</script>\n---\nbase_model: x\n```\n# more"
    card = model_card(name, base=None, recipe={"adapters": [name, "````"]}, metrics=[{"who": name}])
    text, fenced = card.split("`````yaml")
    assert "<script>" not in text and "&lt;script&gt;" in text and len(card.split("`````")) == 3
    assert "<script>" not in fenced.split("`````")[1]
    heading = next(line for line in text.splitlines() if line.startswith("# "))
    assert "alert(1)" in heading and heading.endswith("# more")
