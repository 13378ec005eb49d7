"""Chat messages: checked, and brought to ``[{"role": ..., "content": ...}, ...]`` from the layouts that people use.

What a message says besides role and text is never lost in silence: what a model would have to learn or see (tool calls,
reasoning, images) is refused by name; an empty one counts as absent, since tables fill gaps with nulls. OpenAI's ``weight: 0`` on
an assistant turn means that it is context only. Every other key (name, id, ...) is dropped; `unused_keys` names it for a note.
"""

from __future__ import annotations

import json
from typing import Any

from paft.errors import UsageError

Row = dict[str, Any]

MEANT = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "images", "image", "audio")
KNOWN = {"role", "content", "from", "value", "weight", *MEANT}
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
            "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"}
HINT = "drop such rows (--drop-bad-rows), or write what they hold into the text"


def messages(turns: Any, name: str, *, answer: bool = False) -> list[Row]:
    """The turns of column ``name`` as plain messages; ``answer``: they are to be learnt, so they end with the assistant's words.

    Takes role/content and ShareGPT's from/value (human, gpt, system, ...), one message or a list. UsageError says what is wrong.
    """
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"`{name}` is not a non-empty list of messages")
    plain = [_message(turn, name) for turn in turns]
    last = plain[-1]
    if last["role"] == "assistant" and not last["content"].strip():
        raise UsageError(f"`{name}` ends in an empty answer")
    if answer and last["role"] in ("user", "system"):
        raise UsageError(f"`{name}` ends with a turn of the {last['role']}, not the assistant")
    return plain


def weight(turn: Any) -> bool:
    """Whether an assistant turn is to be learnt: OpenAI's ``weight``, 1 where there is none."""
    given = turn.get("weight")
    if given not in (None, 0, 1):
        raise UsageError(f"a message has weight {given!r}", hint="0 (context only) or 1 (learn it)")
    return given != 0


def no_tools(row: Row) -> None:
    """UsageError for a row that offers tools: none of the layouts here can say a call."""
    if row.get("tools") not in (None, "", "[]", []):
        raise UsageError("it has `tools`, and paft trains on turns of plain text", hint=HINT)


def unused_keys(row: Row) -> set[str]:
    """Keys of the messages in ``row`` that `messages` drops."""
    lists = [value if isinstance(value, list) else [value] for value in row.values() if isinstance(value, list | dict)]
    turns = [turn for turns in lists for turn in turns if isinstance(turn, dict) and ("role" in turn or "from" in turn)]
    return {key for turn in turns for key, value in turn.items() if key not in KNOWN and value is not None}


def _message(turn: Any, name: str) -> Row:
    if not isinstance(turn, dict):
        raise UsageError(f"`{name}`: a message needs a `role` and a `content` string, got {str(turn)[:60]}")
    role, content = turn.get("role"), _text(turn.get("content"))
    if role is None and isinstance(turn.get("from"), str):
        role, content = SHAREGPT.get(turn["from"].lower()), turn.get("value")
        if role is None:
            raise UsageError(f"`{name}` has a turn from {turn['from']!r}, not human, gpt or system", hint=HINT)
    if lost := next((key for key in MEANT if turn.get(key) not in (None, "", [], {})), None):
        raise UsageError(f"`{name}` has a message with `{lost}`, and paft trains on plain text", hint=HINT)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(f"`{name}`: a message needs a `role` and a `content` string, got {_short(turn)}")
    if role in ("tool", "function"):
        raise UsageError(f"`{name}` has a turn of a {role}, and paft trains on plain text", hint=HINT)
    return {"role": role, "content": content}


def _text(content: Any) -> Any:
    """A list of parts, all of them text, as one string."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    return content


def _short(turn: Row) -> str:
    return json.dumps(turn, ensure_ascii=False, default=str)[:60]
