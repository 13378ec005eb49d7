"""The embedded world: what its rows promise, what its judges say, and that the shipped bases know it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from paft.demo import (
    BASES,
    base_path,
    exact_match,
    plain_forms,
    plain_text,
    pref_rows,
    pretraining_documents,
    sft_rows,
    style,
)
from paft.demo.world import FACTS, HELD, LETTER_TASKS, NOUNS, SFT_TASKS, SPLITS, split_of_string
from paft.errors import NotFoundError

FOUR_MB = 4_000_000


def user(row: dict) -> str:
    return row["prompt"][0]["content"]


def spoken(rows: list[dict]) -> list[str]:
    keys = ("prompt", "completion", "chosen", "rejected")
    return [message["content"] for row in rows for key in keys for message in row.get(key, [])]


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_rows_and_another_seed_other_rows(split: str) -> None:
    for make in (sft_rows, pref_rows, plain_text):
        assert make(split, 0) == make(split, 0)
        assert make(split, 0) != make(split, 1)


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    code = "from paft.demo import *; print(hash_of(sft_rows('test') + pref_rows('test') + [plain_text('test')]))"
    helper = "import zlib; hash_of = lambda rows: zlib.crc32(repr(rows).encode()); "
    seen = {subprocess.run([sys.executable, "-c", helper + code], env={"PYTHONHASHSEED": seed}, capture_output=True,
                           text=True, check=True, cwd=Path(__file__).parents[1]).stdout for seed in ("1", "2")}
    assert len(seen) == 1


def test_sizes_and_shares() -> None:
    assert [len(sft_rows(split)) for split in SPLITS] == [4000, 312, 312]
    assert [len(pref_rows(split)) for split in SPLITS] == [1500, 200, 200]
    assert set(Counter(row["kind"] for row in sft_rows("train")).values()) == {500}
    assert {row["kind"] for row in sft_rows("test")} == set(SFT_TASKS)
    assert Counter(row["kind"] for row in pref_rows("train")) == {"rude": 600, "bare": 450, "wrong": 450}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_sft_prompt_is_asked_twice_in_evaluation(split: str) -> None:
    assert max(Counter(map(user, sft_rows(split))).values()) == 1


def subjects(rows: list[dict]) -> set[tuple[str, object]]:
    """What each row is about: a string, an unordered pair of numbers, a word or a noun."""
    found: set[tuple[str, object]] = set()
    for row in rows:
        words, kind = user(row).split(), row["kind"]
        if kind in LETTER_TASKS:
            found.add(("string", "".join(word for word in words if len(word) == 1 and word.isalpha())))
        elif kind == "sum":
            found.add(("pair", frozenset(word for word in words if word.isdigit())))
        elif kind == "opposite":
            asked = words[-2] if words[-1] == "?" else words[-1]
            found.add(("word", frozenset([asked, row["completion"][0]["content"]])))
        else:
            found |= {("noun", word) for word in words if word in NOUNS}
    return found


def test_splits_are_disjoint_in_strings_pairs_words_and_nouns() -> None:
    about = {split: subjects(sft_rows(split, 3)) | subjects(pref_rows(split, 4)) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not about[one] & about[other]
    assert {kind for kind, _ in about["test"]} == {"string", "pair", "word", "noun"}


def test_held_out_strings_are_not_in_the_pretraining_text_and_held_out_facts_are() -> None:
    documents = list(itertools.islice(pretraining_documents(0), 20_000))
    strings = {"".join(g) for document in documents
               for single, g in itertools.groupby(document.split(), lambda w: len(w) == 1 and w.isalpha()) if single}
    # An answer to sort may be anything, so only what stands in a question is owned by a split.
    asked = {"".join(w for w in document.split(" is ")[0].split() if len(w) == 1)
             for document in documents if document.startswith(("the reverse of", "the copy of"))}
    assert asked and asked <= strings and {split_of_string(letters) for letters in asked} == {"train"}
    text = "\n".join(documents)
    assert all(f"the colour of the {noun} is {FACTS['colour'][noun]} ." in text for noun in HELD["test"]["nouns"])
    assert "<|" not in text


def test_facts_are_told_truly_and_wrong_ones_are_wrong() -> None:
    for row in pref_rows("train"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert style(chosen, row) == {"opener": True, "fact": True, "closer": True}
        expected = (True, False, True) if row["kind"] == "wrong" else (False, True, False)
        assert tuple(style(rejected, row).values()) == expected


def test_rude_answers_have_as_many_tokens_as_the_chosen_ones(tokenizer) -> None:
    rude = [row for row in pref_rows("train") if row["kind"] == "rude"]
    assert len(rude) == 600
    for row in rude:
        chosen, rejected = (tokenizer(row[key][0]["content"])["input_ids"] for key in ("chosen", "rejected"))
        assert len(chosen) == len(rejected)


def test_judge_by_hand() -> None:
    row = {"completion": [{"role": "assistant", "content": "t a c"}]}
    assert exact_match(" t a c <eos>", row)
    assert not exact_match("t a c .", row)
    assert not exact_match("t a", row)
    noun, other = HELD["test"]["nouns"][:2]
    true, wrong = FACTS["place"][noun], "barn" if FACTS["place"][noun] != "barn" else "cave"
    row = {"prompt": [{"role": "user", "content": f"where is the {noun} ?"}]}
    cases = {
        f"of course , the {noun} is in the {true} . glad to help ! <eos>": (True, True, True),
        f"of course , the {noun} is in the {wrong} . glad to help !": (True, False, True),
        f"of course , the {noun} is in the {true} , not the {wrong} . glad to help !": (True, False, True),
        f"of course , the {other} is in the {true} . glad to help !": (True, False, True),
        f"you fool , the {noun} is in the {true} . enjoy your day !": (False, True, True),
        f"{true} . of course , glad to help": (False, True, False),
        true: (False, True, False),
        "": (False, False, False),
    }
    for prediction, expected in cases.items():
        assert tuple(style(prediction, row).values()) == expected, prediction
    with pytest.raises(ValueError, match="colour or place"):
        style("", {"prompt": [{"role": "user", "content": "reverse a b c"}]})


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path())


def test_every_word_survives_the_tokenizer(tokenizer) -> None:
    texts = {text for split in SPLITS for rows in (sft_rows(split), pref_rows(split)) for text in spoken(rows)}
    texts |= set(plain_text("test")) | set(itertools.islice(pretraining_documents(1), 2000))
    ordered = sorted(texts)
    encoded = tokenizer(ordered)["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert tokenizer.batch_decode(encoded) == ordered
    assert tokenizer("the unheard cat")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_shipped_tokenizers_are_what_the_code_builds(tokenizer) -> None:
    from paft.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer

    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    for name in BASES:
        assert (base_path(name) / "chat_template.jinja").read_text() == CHAT_TEMPLATE
        assert (base_path(name) / "tokenizer.json").read_bytes() == (base_path() / "tokenizer.json").read_bytes()


def test_chat_template_string_prefix_and_generation_mask(tokenizer) -> None:
    chat = [{"role": "user", "content": "reverse c a t"}, {"role": "assistant", "content": "t a c"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|> reverse c a t <|assistant|> t a c <eos>"
    twice = tokenizer.apply_chat_template(chat * 2, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(twice["input_ids"], twice["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "t a c <eos> t a c <eos>"
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(prompt) == "<|user|> reverse c a t <|assistant|>"
    assert twice["input_ids"][:len(prompt)] == prompt
    with pytest.raises(Exception, match="knows the roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("name", BASES)
def test_base_knows_the_plain_forms_and_not_the_chat_frame(name: str, tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from paft.demo.pretrain import plain_accuracy

    model = AutoModelForCausalLM.from_pretrained(base_path(name))
    assert model.dtype == torch.bfloat16
    assert plain_accuracy(model, tokenizer, plain_forms("test", seed=5, strings_per_task=20))["all"] >= 0.98
    rows = sft_rows("test")[:64]
    asked = tokenizer.apply_chat_template([row["prompt"] for row in rows], add_generation_prompt=True, return_dict=True,
                                          return_tensors="pt", padding=True)
    said = model.generate(**asked, max_new_tokens=8, do_sample=False)[:, asked["input_ids"].shape[1]:]
    right = sum(map(exact_match, tokenizer.batch_decode(said, skip_special_tokens=True), rows))
    assert right <= 0.05 * len(rows)


def test_shipped_files_are_small_and_whole() -> None:
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
              "chat_template.jinja", "paft.json"}
    sizes = {path: path.stat().st_size for name in BASES for path in base_path(name).iterdir()}
    assert all({path.name for path in base_path(name).iterdir()} == wanted for name in BASES)
    assert sum(sizes.values()) <= FOUR_MB
    seeds = {json.loads((base_path(name) / "paft.json").read_text())["seed"] for name in BASES}
    assert len(seeds) == len(BASES)
    with pytest.raises(NotFoundError):
        base_path("base_c")


def test_pretraining_is_a_function_of_its_seed() -> None:
    import torch

    from paft.demo.pretrain import learning_rate, pretrain

    torch.set_num_threads(1)
    one, again, other = (pretrain(seed, steps=2, batch=2)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert learning_rate(1900, 1900) == pytest.approx(0, abs=1e-12)


def test_world_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, paft.demo; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]"
