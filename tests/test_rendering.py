"""What is shown and checked before the training is what the trainer then sees, and each trap is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE
from datakit import Row, assistant, user
from trainkit import parts, pref_rows, sft_rows
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from paft.data import dataset
from paft.data.template import SHIPPED
from paft.errors import MismatchError, NotFoundError, UsageError
from paft.models import load_tokenizer
from paft.recipe import DpoRecipe, SftRecipe
from paft.train.rendering import check_rendering, render

TALK = [user("is it"), assistant("yes"), user("what"), assistant("no cat")]
CHAT: list[Row] = [{"prompt": TALK[:1], "completion": TALK[1:2]}, {"prompt": TALK[:3], "completion": TALK[3:]}]


def recipe(base: Path, kind: Any = SftRecipe, **trainer: Any) -> Any:
    return kind(model=str(base), trainer=trainer)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (sft_rows(8), {}),
        (sft_rows(8, chat=True), {}),
        (sft_rows(8, chat=True), {"max_length": 7}),
        (sft_rows(8, chat=True), {"max_length": 7, "truncation_mode": "keep_end"}),
        (sft_rows(8, chat=True), {"completion_only_loss": False}),
        (sft_rows(8, chat=True), {"assistant_only_loss": True}),
        (CHAT, {"assistant_only_loss": True, "completion_only_loss": False}),
        ([{"text": "the cat is red"}, {"text": "no"}], {}),
    ],
)
def test_sft_rows_render_as_the_trainer_prepares_them(rows: list[Row], options: dict[str, Any], tiny_base: Path,
                                                      tmp_path: Path) -> None:
    model, tokenizer = parts(tiny_base)
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **options)
    prepared: Any = SFTTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=dataset(rows)).train_dataset
    wanted = [(row["input_ids"], row["labels"]) for row in prepared]
    found = [(row[0].ids, [token if on else -100 for token, on in zip(row[0].ids, row[0].trained, strict=True)])
             for row in render(tokenizer, rows, recipe(tiny_base, **options)) if any(row[0].trained)]
    assert found == wanted and wanted


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_length": 10}, {"max_length": 8, "truncation_mode": "keep_end"}])
def test_pairs_render_as_the_trainer_collates_them(chat: bool, options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    rows = pref_rows(6, chat=chat)
    model, tokenizer = parts(tiny_base)
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **options)
    trainer = DPOTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=dataset(rows))
    prepared: Any = trainer.train_dataset
    assert len(prepared) == len(rows)
    rendered = render(tokenizer, rows, recipe(tiny_base, DpoRecipe, **options))
    for i, (chosen, rejected) in enumerate(rendered):
        batch = trainer.data_collator([prepared[i]])
        for place, sequence in enumerate((chosen, rejected)):
            real = batch["attention_mask"][place].bool()
            assert batch["input_ids"][place][real].tolist() == sequence.ids
            assert batch["completion_mask"][place][real].bool().tolist() == sequence.trained


def test_eos_is_learnt_though_it_is_the_pad_token(tiny_base: Path, tmp_path: Path) -> None:
    """Masking labels by the id of pad would hide the end of each answer where pad is eos."""
    model, tokenizer = parts(tiny_base)
    tokenizer.pad_token = tokenizer.eos_token
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=dataset(CHAT))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert [(row == tokenizer.eos_token_id).sum() for row in batch["labels"]] == [1, 1]
    assert (batch["input_ids"] == tokenizer.eos_token_id).sum() > 3


# Traps


def notes(base: Path, rows: list[Row], tokenizer: Any = None, **trainer: Any) -> list[str]:
    told: list[str] = []
    check_rendering(tokenizer or load_tokenizer(str(base)), {"train": rows}, recipe(base, **trainer), told.append)
    return told


def test_good_rows_have_no_traps(tiny_base: Path) -> None:
    assert notes(tiny_base, CHAT) == notes(tiny_base, sft_rows(5)) == notes(tiny_base, pref_rows(5)) == []


def test_a_template_without_eos_is_told_unless_the_model_stops_there(tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("eos_token", "'please'"))
    assert any("no answer ends in a token that stops generation (<eos>)" in line for line in notes(base, CHAT))
    please = load_tokenizer(str(base)).convert_tokens_to_ids("please")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, please]}))
    assert notes(base, CHAT) == []
    for config in ('{"eos_token_id": 5}', "{}"):  # the tokenizer's own eos counts whatever the model names
        (base / "generation_config.json").write_text(config)
        assert notes(base, sft_rows(3)) == []


def test_a_doubled_and_a_missing_bos_are_told(tiny_base: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = load_tokenizer(str(tiny_base))
    tokenizer.bos_token = "<system>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<system> $A", special_tokens=[("<system>", bos)])
    assert notes(tiny_base, sft_rows(3), tokenizer) == []
    assert "does not begin with <system>" in notes(tiny_base, CHAT, tokenizer)[0]
    begun = [{**row, "prompt": "<system> " + row["prompt"]} for row in sft_rows(3)]
    assert "begin with <system> twice" in notes(tiny_base, begun, tokenizer)[0]


def test_rows_that_max_length_cuts_are_told_and_refused_when_all(tiny_base: Path) -> None:
    long = {"prompt": "the cat is " * 20, "completion": " yes"}
    some = [*sft_rows(9), long]
    assert notes(tiny_base, some, max_length=40) == [
        "1 of 10 rows looked at lose their whole answer: the prompt alone fills max_length=40"]
    assert notes(tiny_base, some, max_length=61) == [
        "1 of 10 rows looked at are longer than max_length=61 and lose the end of the answer"]
    with pytest.raises(MismatchError, match="no row is left"):
        notes(tiny_base, [long, long], max_length=40)
    assert notes(tiny_base, some, max_length=40, packing=True, packing_strategy="wrapped") == []


def test_words_and_tokens_that_the_model_does_not_have(tiny_base: Path) -> None:
    assert "are <unk>" in notes(tiny_base, [{"prompt": "Janet's ducks", "completion": " lay eggs"}])[0]
    tokenizer: Any = load_tokenizer(str(tiny_base))
    tokenizer.add_tokens([f"<extra{i}>" for i in range(20)])
    assert notes(tiny_base, sft_rows(3), tokenizer) == []
    with pytest.raises(MismatchError, match=r"token \d+ \('<extra19>'\), and the model has only 64"):
        notes(tiny_base, [{"prompt": "a", "completion": " <extra19>"}], tokenizer)


def test_a_template_that_refuses_a_row_gives_one_line(tiny_base: Path) -> None:
    tokenizer: Any = load_tokenizer(str(tiny_base))
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    assert notes(tiny_base, CHAT, tokenizer) == []
    with pytest.raises(UsageError, match="the chat template refuses a row: no system"):
        notes(tiny_base, [{"prompt": [{"role": "system", "content": "a"}, *TALK[:1]], "completion": TALK[1:2]}], tokenizer)


# Templates


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_ends_answers_with_eos_and_keeps_the_prompt_a_prefix(name: str, tiny_base: Path) -> None:
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    tokenizer: Any = load_tokenizer(str(tiny_base), template=name)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    asked = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert whole == asked + "no cat<eos>" and "is it" in asked and "yes<eos>" in asked
    assert has_generation_markers(tokenizer.chat_template) and is_chat_template_stop_token_trained(tokenizer)
    assert "please" in tokenizer.apply_chat_template([{"role": "system", "content": "please"}, *TALK], tokenize=False)


def test_shipped_templates_are_the_known_ones(tiny_base: Path) -> None:
    said = {name: load_tokenizer(str(tiny_base), template=name).apply_chat_template(TALK[:2], tokenize=False) for name in SHIPPED}
    assert said == {
        "zephyr": "<|user|>\nis it<eos>\n<|assistant|>\nyes<eos>",
        "chatml": "<|im_start|>user\nis it<|im_end|>\n<|im_start|>assistant\nyes<eos>",
        "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request."
                  "\n\n### Instruction:\nis it\n\n### Response:\nyes<eos>",
    }


def test_a_shipped_template_begins_with_bos_where_text_does() -> None:
    from paft.data.template import choose_template

    def named(ids: list[int]) -> Any:
        class Tokenizer(SimpleNamespace):
            def __call__(self, _: str) -> dict[str, list[int]]:
                return {"input_ids": ids}
        return Tokenizer(bos_token_id=7)

    for ids, begins in (([7, 1], True), ([1], False)):
        tokenizer = named(ids)
        choose_template(tokenizer, "zephyr")
        assert tokenizer.chat_template.startswith("{{- bos_token -}}") is begins


def test_what_is_no_template(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no chat template 'zefyr'") as caught:
        load_tokenizer(str(tiny_base), template="zefyr")
    assert "zephyr" in str(caught.value.hint)
    for text, words in (("{% for %}", "is no chat template: "), ("hello", "does not say what messages say")):
        (tmp_path / "a.jinja").write_text(text)
        with pytest.raises(UsageError, match=words):
            load_tokenizer(str(tiny_base), template=str(tmp_path / "a.jinja"))
