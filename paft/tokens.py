"""Rows into token ids, exactly as TRL's trainers tokenise them: where the prompt ends and the answer starts."""

from __future__ import annotations

from typing import Any

from paft.data import Row


def prompt_ids(tokenizer: Any, prompt: str | list[Row]) -> list[int]:
    """Token ids of a prompt, with the chat template's generation prompt for messages."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])


def encode(tokenizer: Any, row: Row, answer: str) -> tuple[list[int], int]:
    """(ids of prompt + answer, length of the prompt), tokenised as TRL does: the answer starts where the two diverge.

    A row without a prompt is all answer but for its first token, which nothing predicts.
    """
    if "prompt" not in row:
        return list(tokenizer(_ended(tokenizer, row["text"]))["input_ids"]), 1
    prompt, reply = row["prompt"], row[answer]
    start = prompt_ids(tokenizer, prompt)
    if isinstance(prompt, str):
        full = list(tokenizer(prompt + _ended(tokenizer, reply))["input_ids"])
    else:
        full = list(tokenizer.apply_chat_template(prompt + reply, tokenize=True, return_dict=True)["input_ids"])
    length = next((i for i, (a, b) in enumerate(zip(start, full, strict=False)) if a != b), min(len(start), len(full)))
    return full, length


def boundary_moves(tokenizer: Any, row: Row, answer: str) -> bool:
    """Whether the prompt's last tokens change when an answer follows, so that training and inference see other contexts."""
    return "prompt" in row and encode(tokenizer, row, answer)[1] < len(prompt_ids(tokenizer, row["prompt"]))


def _ended(tokenizer: Any, text: str) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
