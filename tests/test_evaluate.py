"""Scores against TRL's own evaluation, and what must not change them: batches, order, padding, truncation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory, make_tokenizer
from test_train_penalised import dpo_trainer
from trainkit import pref_rows, sft_rows, start_away_from_zero
from transformers import GPT2Config, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer

from paft import candidates
from paft.data import dataset
from paft.errors import UsageError
from paft.evaluate import Evaluator, Held, answer_logps
from paft.models import load_model, load_tokenizer, wrap
from paft.recipe import SftRecipe
from paft.train.stage import train

LN2 = round(math.log(2), 6)
TEXT = [{"text": row["prompt"]} for row in sft_rows(7, seed=3)] + [{"text": "the cat <eos>"}]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Any:
    return load_model(str(tiny_base))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


@pytest.fixture
def adapted(tiny_base: Path, make_adapter: AdapterFactory) -> Any:
    return wrap(load_model(str(tiny_base)), make_adapter(tiny_base, seed=1))


MERGING = [{"prompt": "the cat", "completion": "dog"}, {"prompt": "the dog ", "completion": "two one <eos>"}]


@pytest.mark.parametrize(
    "rows",
    [sft_rows(9, answer=None), sft_rows(9, answer=None, chat=True), TEXT, MERGING],
    ids=["strings", "chat", "text", "tokens merge at the boundary"],
)
def test_sft_loss_is_trls(rows: list[Any], base: Any, tokenizer: Any, tiny_base: Path, tmp_path: Path) -> None:
    # One batch of all rows: TRL takes the mean of its batches' means.
    args = SFTConfig(output_dir=str(tmp_path), per_device_eval_batch_size=len(rows), report_to="none", bf16=False)
    judge = SFTTrainer(
        model=load_model(str(tiny_base)),
        args=args,
        processing_class=tokenizer,
        train_dataset=dataset(rows),
        eval_dataset=dataset(rows),
    )
    assert Evaluator(tokenizer, Held(rows, [], []))(base)["sft_loss"] == pytest.approx(judge.evaluate()["eval_loss"], abs=2e-6)


MIXED = [
    {"prompt": "the cat", "chosen": "dog one", "rejected": " no"},
    {"prompt": "a bird", "chosen": " yes", "rejected": "fish"},
]


@pytest.mark.parametrize(
    "rows", [pref_rows(16), pref_rows(16, chat=True), MIXED], ids=["strings", "chat", "tokens merge in one answer"]
)
def test_preference_metrics_are_trls(rows: list[Any], base: Any, tokenizer: Any, tiny_base: Path, tmp_path: Path) -> None:
    options = {"per_device_eval_batch_size": len(rows), "per_device_train_batch_size": 4}
    trainer = start_away_from_zero(dpo_trainer(tiny_base, tmp_path, eval_rows=rows, beta=0.7, trainer=options))
    theirs = trainer.evaluate()
    ours = Evaluator(tokenizer, Held([], rows, []), beta=0.7).against(base)(trainer.model)
    assert ours["dpo_loss"] == pytest.approx(theirs["eval_loss"], abs=3e-6)
    assert ours["pref_accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"], abs=1e-6)
    assert abs(ours["dpo_loss"] - LN2) > 1e-4


def test_the_reference_against_itself(base: Any, tokenizer: Any) -> None:
    assert Evaluator(tokenizer, Held([], pref_rows(9), [])).against(base)(base) == {"dpo_loss": LN2, "pref_accuracy": 0.5}


def held(order: Callable[[list[Any]], list[Any]] = list) -> Held:
    return Held(order(sft_rows(11, answer=None)), order(pref_rows(11, chat=True)), order(TEXT))


def test_batch_size_and_order_do_not_matter(base: Any, tokenizer: Any, adapted: Any) -> None:
    def scores(rows: Held, batch_size: int) -> dict[str, float]:
        return Evaluator(tokenizer, rows, batch_size=batch_size).against(base)(adapted)

    wanted = scores(held(), 64)
    assert wanted.keys() == {"sft_loss", "dpo_loss", "pref_accuracy", "text_loss"}
    for batch_size in (1, 3):
        assert scores(held(), batch_size) == pytest.approx(wanted, abs=2e-6)
    assert scores(held(lambda rows: rows[::-1]), 4) == pytest.approx(wanted, abs=2e-6)


def test_what_is_not_held_is_not_scored(base: Any, tokenizer: Any) -> None:
    assert Evaluator(tokenizer, Held([], pref_rows(3), []))(base) == {}
    assert Held(*held().__dict__.values()).head(2) == Held(held().sft[:2], held().pref[:2], held().text[:2])


def test_log_probabilities_are_the_plain_ones(base: Any) -> None:
    coded = [([7, 8, 9, 10], 2), ([11, 12], 1), ([5, 6, 7], 0)]
    total, count = answer_logps(base, coded, 0, 2)
    assert count.tolist() == [2, 1, 2]  # the first token of a row is predicted by nothing
    for (ids, start), found in zip(coded, total, strict=True):
        with torch.no_grad():
            logps = base(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
        wanted = sum(logps[i - 1, ids[i]] for i in range(max(start, 1), len(ids)))
        assert found.item() == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_the_shares_of_several_processes_add_up(processes: int, base: Any) -> None:
    """To the bit, and each calls the model equally often."""
    draw = torch.Generator().manual_seed(3)
    coded = [(torch.randint(5, 60, (3 + i % 4,), generator=draw).tolist(), 1) for i in range(7)]
    calls: list[int] = []

    def counted(**inputs: Any) -> Any:
        calls[-1] += 1
        return base(**inputs)

    parts = []
    for mine in range(processes):
        calls.append(0)
        parts.append(answer_logps(_Called(base, counted), coded, 0, 2, share=(mine, processes)))
    whole = answer_logps(base, coded, 0, 2)
    for each, wanted in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(sum(each), wanted)  # type: ignore[arg-type]
    assert len(set(calls)) == 1


class _Called:
    """A model whose calls are counted."""

    def __init__(self, model: Any, call: Any) -> None:
        self.device, self.config, self.call = model.device, model.config, call

    def __call__(self, **inputs: Any) -> Any:
        return self.call(**inputs)


def test_rows_longer_than_the_context_are_cut(tmp_path: Path) -> None:
    """GPT-2 has a table of positions: one token too many is an index error."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    )
    long = "the cat " * 20
    rows = Held(
        [{"prompt": long, "completion": " dog"}, {"prompt": "a", "completion": " dog"}],
        [{"prompt": "a", "chosen": " " + long, "rejected": " no"}],
        [{"text": long}],
    )
    tokenizer = make_tokenizer()
    scores = Evaluator(tokenizer, rows, generate=4).against(model)(model)
    assert all(math.isfinite(score) for score in scores.values())
    assert (
        scores["sft_loss"] == Evaluator(tokenizer, Held(rows.sft[1:], [], []))(model)["sft_loss"]
    )  # a cut-off answer counts nothing


def test_padding_does_not_change_greedy_answers(base: Any, adapted: Any, tokenizer: Any) -> None:
    rows = sft_rows(9, seed=4) + sft_rows(3, seed=5, chat=True)
    for model in (base, adapted):
        evaluator = Evaluator(tokenizer, Held(rows, [], []), generate=6)
        together = evaluator.answers(model, rows)
        assert together == [evaluator.answers(model, [row])[0] for row in rows]
        assert len(set(together)) > 3


def test_an_overfitted_model_answers_exactly(tiny_base: Path, base: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = sft_rows(4, answer=None)
    recipe = SftRecipe(
        model=str(tiny_base), lora={"r": 8, "alpha": 16}, trainer={"max_steps": 100, "learning_rate": 1e-2, "logging_steps": 100}
    )
    train(recipe, tmp_path / "a", rows={"train": rows, "eval": []}, quiet=True)
    scorer = Evaluator(tokenizer, Held(rows, [], []), generate=8)
    before = scorer(base)
    assert before["exact_match"] == 0
    scores = scorer(wrap(load_model(str(tiny_base)), tmp_path / "a"))
    assert scores["exact_match"] == 1
    assert scores["sft_loss"] < before["sft_loss"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, rows in (("sft_data", sft_rows(6)), ("pref_data", pref_rows(6)), ("text", TEXT)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(file)
    return found


SETTINGS = {"beta": 0.1, "generate": 4, "rows": None, "batch_size": 8, "quiet": True}


def test_an_adapter_and_its_merged_model_score_the_same(
    files: dict[str, str], tiny_base: Path, make_adapter: AdapterFactory, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, seed=2)
    merged = tmp_path / "merged"
    wrap(load_model(str(tiny_base)), adapter).merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    found = candidates.score([str(adapter), str(merged)], base=None, **files, **SETTINGS)
    assert [row["name"] for row in found] == [str(tiny_base), str(adapter), str(merged)]
    start, one, other = ({key: value for key, value in row.items() if key != "name"} for row in found)
    assert one == pytest.approx(other, abs=2e-5)
    assert (start["dpo_loss"], start["pref_accuracy"]) == (LN2, 0.5)
    assert start["sft_loss"] != pytest.approx(one["sft_loss"], abs=1e-3)


def test_whole_models_need_a_base_for_preferences_only(files: dict[str, str], tiny_base: Path, tiny_tied_base: Path) -> None:
    settings = {**SETTINGS, "base": None, "sft_data": files["sft_data"], "text": None}
    found = candidates.score([str(tiny_base), str(tiny_tied_base)], pref_data=None, **settings)
    assert [sorted(row) for row in found] == [["exact_match", "name", "sft_loss"]] * 2
    with pytest.raises(UsageError, match="no base"):
        candidates.score([str(tiny_base)], pref_data=files["pref_data"], **settings)


def test_an_adapter_that_names_no_base_needs_one(files: dict[str, str], tiny_base: Path, make_adapter: AdapterFactory) -> None:
    adapter = make_adapter(tiny_base, seed=3)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    settings = {**SETTINGS, "generate": 0, "sft_data": files["sft_data"], "pref_data": None, "text": None, "rows": 2}
    with pytest.raises(UsageError, match="no base"):
        candidates.score([str(adapter)], base=None, **settings)
    assert len(candidates.score([str(adapter)], base=str(tiny_base), **settings)) == 2
