"""Two trainings over one copy of the base give what each gives alone, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainkit import factors, identical, parts, pref_rows, sft_rows
from transformers import set_seed

from paft.recipe import DpoRecipe, SftRecipe
from paft.train import preference, sft
from paft.train.interleave import TakeTurns, Turn, interleave, twin

LORA = {"r": 2, "dropout": 0.3}  # dropout draws from the process's generator


def trainer_of(kind: str, base: Path, model: Any, steps: int, scratch: Path) -> Any:
    tokenizer = parts(base)[1]
    set_seed(len(kind))
    options = {"max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    if kind == "sft":
        recipe = SftRecipe.model_validate({"lora": LORA, "l1": 1e-4, "trainer": options, "seed": 3})
        return sft.build(recipe, model, tokenizer, sft_rows(9), [], str(scratch / kind))
    recipe = DpoRecipe.model_validate({"lora": LORA, "trainer": {**options, "disable_dropout": False}, "seed": 4})
    return preference.build(recipe, model, tokenizer, pref_rows(7), [], str(scratch / kind))


def job(kind: str, base: Path, model: Any, steps: int, scratch: Path) -> Callable[[Turn], dict[str, Tensor]]:
    def work(turn: Turn) -> dict[str, Tensor]:
        trainer = trainer_of(kind, base, model, steps, scratch)
        trainer.add_callback(TakeTurns(turn))
        trainer.train()
        return factors(trainer)

    return work


@pytest.mark.parametrize("steps", [(4, 4), (5, 3)])
def test_interleaved_equals_alone(tiny_base: Path, tmp_path: Path, steps: tuple[int, int]) -> None:
    alone = [job(kind, tiny_base, parts(tiny_base)[0], count, tmp_path / "alone")(lambda: None)
             for kind, count in zip(("sft", "dpo"), steps, strict=True)]
    base = parts(tiny_base)[0]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    order: list[str] = []

    def noted(kind: str, work: Callable[[Turn], Any]) -> Callable[[Turn], Any]:
        return lambda turn: work(lambda: (order.append(kind), turn())[1])

    both = interleave([noted(kind, job(kind, tiny_base, twin(base), count, tmp_path / "both"))
                       for kind, count in zip(("sft", "dpo"), steps, strict=True)])
    assert all(identical(one, other) for one, other in zip(alone, both, strict=True))
    assert order[:6] == ["sft", "dpo"] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_twin_holds_no_weights_of_its_own(tiny_base: Path) -> None:
    model = parts(tiny_base)[0]
    other = twin(model)
    assert other is not model and other.model.layers[0] is not model.model.layers[0]
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_the_first_error_stops_the_others() -> None:
    went: list[int] = []

    def endless(turn: Turn) -> None:
        while True:
            went.append(1)
            turn()

    def fails(turn: Turn) -> None:
        turn()
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        interleave([endless, fails])
    assert len(went) == 2


def test_generators_belong_to_a_job() -> None:
    def draw(turn: Turn) -> list[float]:
        torch.manual_seed(5)
        found = []
        for _ in range(3):
            found.append(float(torch.rand(())))
            turn()
        return found

    one, two = interleave([draw, draw])
    assert one == two and len(set(one)) == 3
