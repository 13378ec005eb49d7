"""Generated answers: AlpacaEval's file, judges that work and that fail, reward models."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory, make_tokenizer
from datakit import pair_rows, write_jsonl
from transformers import LlamaConfig, LlamaForSequenceClassification

from paft.answers import Answers, Reward, alpaca_file, load_judge, load_prompts
from paft.cli import invoke
from paft.errors import MismatchError, NotFoundError, UsageError
from paft.evaluate import Evaluator, Held
from paft.models import load_model, load_tokenizer, wrap

QUESTIONS = [{"instruction": f"what is the {noun}", "dataset": "helpful", "output": "no", "generator": "other"}
             for noun in "cat dog bird fish red".split()]


@pytest.fixture(scope="module")
def model(tiny_base: Path, make_adapter: AdapterFactory) -> Any:
    return wrap(load_model(str(tiny_base)), make_adapter(tiny_base, seed=1))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def test_the_file_is_alpaca_eval_s(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompts = load_prompts(str(write_jsonl(tmp_path / "eval.jsonl", QUESTIONS)))
    Answers(prompts, tmp_path / "out.json", tokens=6)("a/b c", model, tokenizer)
    assert alpaca_file(tmp_path / "out.json", "a/b c") == tmp_path / "out-a-b-c.json"
    found = json.loads((tmp_path / "out-a-b-c.json").read_text())
    asked = [{"prompt": [{"role": "user", "content": row["instruction"]}]} for row in QUESTIONS]  # through the chat template
    texts = Evaluator(tokenizer, Held([], [], []), generate=6).answers(model, asked)
    assert found == [{"dataset": "helpful", "instruction": row["instruction"], "output": text, "generator": "a/b c"}
                     for row, text in zip(QUESTIONS, texts, strict=True)]
    assert len(set(texts)) > 1


def test_drawn_answers_repeat_and_leave_the_generator_alone(model: Any, tokenizer: Any) -> None:
    prompts = [{"prompt": row["instruction"]} for row in QUESTIONS]

    def answers(**options: Any) -> list[str]:
        texts: list[str] = []
        Answers(prompts, judge=("m:f", lambda text, row: texts.append(text) or 0), tokens=6, **options)("x", model, tokenizer)
        return texts

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = answers(temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(temperature=2.0) == first != answers(temperature=2.0, seed=1)
    assert answers() == answers(seed=1) != first  # greedy


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    pairs = load_prompts(str(write_jsonl(tmp_path / "p.jsonl", pair_rows(3))))
    assert [row["prompt"] for row in pairs] == [row["prompt"] for row in pair_rows(3)] and "chosen" in pairs[0]
    rows = load_prompts(str(write_jsonl(tmp_path / "s.jsonl", [{"prompt": "the cat", "completion": " red"}])))
    assert rows[0]["prompt"] == "the cat"
    with pytest.raises(UsageError, match="only text"):
        load_prompts(str(write_jsonl(tmp_path / "t.jsonl", [{"text": "the cat"}])))


def test_a_judge_s_means_and_errors(model: Any, tokenizer: Any) -> None:
    rows, values = pair_rows(5), [0.0, 1.0, 4.0, 2.0, 3.5]
    told = iter(values)

    def judge(answer: str, row: Any) -> dict[str, Any]:
        assert row["chosen"] and isinstance(answer, str)
        return {"grade": next(told), "short": True}

    answers = Answers(rows, judge=("m:judge", judge), tokens=3)
    found = answers("x", model, tokenizer)
    assert found["grade"] == statistics.mean(values) and found["short"] == 1 and found["short_stderr"] == 0
    assert found["grade_stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(5), abs=1e-6)
    assert [column.key for column in answers.columns] == ["grade", "short"]


@pytest.mark.parametrize("answer", [lambda text, row: 1 / 0, lambda text, row: "good", lambda text, row: None])
def test_a_judge_that_fails_is_one_line(answer: Any, model: Any, tokenizer: Any) -> None:
    with pytest.raises(MismatchError, match="the judge m:judge failed on answer 1 of x"):
        Answers(pair_rows(2), judge=("m:judge", answer), tokens=2)("x", model, tokenizer)


def reward_model(path: Path, labels: int = 1) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, num_labels=labels, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_reward_is_the_logit_of_prompt_and_answer(tmp_path: Path) -> None:
    path = reward_model(tmp_path / "rm")
    rows, texts = [{"prompt": "the cat"}, *pair_rows(3)], ["red", "yes please thanks", "no", "blue blue blue"]
    found = Reward(str(path), batch_size=3)(texts, rows)  # padded
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(path).eval(), make_tokenizer()
    for row, text, value in zip(rows, texts, found, strict=True):
        turns = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
        ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": text}], return_dict=True,
                                            return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert value == pytest.approx(model(ids).logits.item(), abs=1e-6)
    assert len({round(value, 5) for value in found}) == 4


def test_reward_models_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(MismatchError, match="2 labels"):
        Reward(str(reward_model(tmp_path / "rm", labels=2)))
    with pytest.raises(MismatchError, match="no reward model"):
        Reward(str(tiny_base))  # a language model has no trained head of this kind
    with pytest.raises(NotFoundError):
        Reward(str(tmp_path / "nowhere"))


def test_finished_candidates_are_kept(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, capsys: Capture,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tiny_base, make_adapter, tmp_path)
    (tmp_path / "judges_for_test.py").write_text(
        "seen = []\ndef third(answer, row):\n    seen.append(answer)\n    assert len(seen) <= 4, 'out of credit'\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["eval", str(world.one), str(world.two), "--pref-data", str(world.pairs), "--rows", "2", "--generate", "2",
               "--alpaca-out", "out.json", "--json"]
    assert invoke([*command, "--judge", "judges_for_test:third"]) == 3
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)] == [str(tiny_base), str(world.one)]
    assert err.startswith("error: the judge judges_for_test:third failed on answer 1 of") and "out of credit" in err
    assert len(list(tmp_path.glob("out-*.json"))) == 3
    assert_one_error(capsys, invoke([*command, "--judge", "judges_for_test"]), 2, "not MODULE:FUNCTION")
    assert_one_error(capsys, invoke([*command, "--judge", "judges_for_test:none"]), 2, "no attribute 'none'")
    assert load_judge("judges_for_test:third")[0] == "judges_for_test:third"
