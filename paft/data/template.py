"""Chat templates for a model that has none: three that ship, or a file.

    zephyr   <|user|> ... </s> <|assistant|> ... </s>            plain text markers; suits any vocabulary
    chatml   <|im_start|>user ... <|im_end|> <|im_start|>assistant ...
    alpaca   Below is an instruction ... ### Instruction: ... ### Response: ...    (a system message replaces the first sentence)

In each an assistant turn ends in the tokenizer's own eos token and nothing else, so that a model learns to stop whatever its
vocabulary is (plain ChatML ends in ``<|im_end|>``, which is no token of most base models), and is marked ``{% generation %}``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from paft.errors import NotFoundError, UsageError, did_you_mean

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
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # jinja's own, or whatever its code calls
        raise UsageError(f"{name} is no chat template: {(str(error).splitlines() or [''])[0]}") from error
    if "question" not in text or "reply" not in text:
        raise UsageError(f"{name} is no chat template: it does not say what messages say",
                         hint="it needs a loop over `messages` with their `role` and `content`")
