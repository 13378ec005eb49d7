"""Chat templates for a model that has none: three that ship, or a file.

    zephyr   <|user|> ... </s> <|assistant|> ... </s>            plain text markers; suits any vocabulary
    chatml   <|im_start|>user ... <|im_end|> <|im_start|>assistant ...
    alpaca   Below is an instruction ... ### Instruction: ... ### Response: ...    (a system message replaces the first sentence)

In each an assistant turn ends in the tokenizer's own eos token and nothing else, so that a model learns to stop whatever its
vocabulary is (plain ChatML ends in ``<|im_end|>``, which is no token of most base models), and is marked ``{% generation %}``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paft.bounded import Refused, tried
from paft.errors import MismatchError, NotFoundError, UsageError, did_you_mean

LARGEST = 1_000_000  # bytes of a template; those in use have below 20,000
_LONGEST, _FOLD = 1_000_000, 20  # characters that a conversation may become, and so many times those that it says
_TURNS = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
SHIPPED = {file.stem: file for file in sorted((Path(__file__).parent / "chat").glob("*.jinja"))}


def choose_template(tokenizer: Any, name: str) -> None:
    """Give ``tokenizer`` the chat template ``name``: a shipped one, or the file of that path.

    A shipped one begins with bos where the tokenizer begins plain text with it: TRL renders messages without adding any token.
    Raises NotFoundError for an unknown name, UsageError for what is no template of messages.
    """
    path = Path(os.path.expanduser(name))
    if name in SHIPPED:
        ids, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
        begin = "{{- bos_token -}}\n" if bos is not None and ids[:1] == [bos] else ""
        tokenizer.chat_template = begin + SHIPPED[name].read_text(encoding="utf-8")
        return
    if not path.is_file():
        raise NotFoundError(f"no chat template {name!r}: no file, and none that ships", hint=did_you_mean(name, SHIPPED))
    if path.stat().st_size > LARGEST:
        raise UsageError(f"{name} is no chat template: it is larger than {LARGEST // 10**6} MB")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        if why := endless(tokenizer, [_TURNS]):
            raise ValueError(f"it {why}")
        text = tokenizer.apply_chat_template(_TURNS, tokenize=False)
    except Exception as error:  # jinja's own, or whatever its code calls
        raise UsageError(f"{name} is no chat template: {(str(error).splitlines() or [''])[0]}") from error
    if "question" not in text or "reply" not in text:
        raise UsageError(f"{name} is no chat template: it does not say what messages say",
                         hint="it needs a loop over `messages` with their `role` and `content`")


def endless(tokenizer: Any, conversations: Sequence[Sequence[Any]]) -> str | None:
    """In words, that the chat template does not come to an end within `paft.bounded`'s limits on ``conversations``; else None.

    A template is a program (Jinja's sandbox keeps it from files and modules, not from nested loops), and often a stranger's.
    Tried are these conversations: one that waits for a certain later row is not found out.
    """
    from jinja2 import TemplateError

    def render() -> None:
        for turns in conversations:
            most = _LONGEST + _FOLD * sum(len(str(turn)) for turn in turns)
            for more in (False, True):
                try:
                    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=more)
                except TemplateError:  # turns that it does not take: told where they matter
                    continue
                except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
                    raise Refused from error
                if len(text) > most:
                    raise Refused
    return tried(render)


def check_template(tokenizer: Any, name: str, conversations: Sequence[Sequence[Any]] = (_TURNS,)) -> None:
    """MismatchError where the chat template of ``name`` is `endless`."""
    if tokenizer.chat_template and conversations and (why := endless(tokenizer, conversations)):
        raise MismatchError(f"the chat template of {name} {why}", hint="choose another one with --chat-template, e.g. chatml")
