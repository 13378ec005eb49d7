"""Every layout of a row that paft knows, and its conversion to the one shape of its role.

    role      shape after conversion                    learnt by
    sft       prompt, completion    (or ``text``)       SFT
    pref      prompt, chosen, rejected                  DPO and kin
    unpaired  prompt, completion, label: bool           KTO
    scored    prompt, completion, label: 0 ... 1, or    UFT
              a pair as pref has it
    text      text                                      measured only

Prompt and answers are strings or lists of messages (TRL's standard and conversational formats). The first layout in `LAYOUTS`
whose columns a row has is taken; with a column mapping, the first that uses a mapped column. Decisions:

* A conversation gives one row for every assistant turn, whose prompt is all that came before, so that only answers are learnt,
  with any chat template. TRL trains on a whole `messages` row unless the template marks the assistant's words.
* Alpaca rows become messages: the user says the instruction and, after an empty line, the input. So they train with the model's
  own chat template; with the template ``alpaca`` that ships they render as Stanford's prompt, but for its separate input section.
* ``user`` / ``assistant`` / ``system`` are columns of strings that become messages. A ``system`` column beside any other layout
  comes first in its prompt, which turns strings into messages.
* Preference pairs serve as unpaired (chosen is true, rejected false), and as scored, where they stay pairs.
* Anthropic's HH-RLHF strings (``\\n\\nHuman: ... \\n\\nAssistant: ...``) are taken apart into messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from paft.data.messages import Row, messages, no_tools, weight
from paft.errors import UsageError

Role = Literal["sft", "pref", "unpaired", "scored", "text"]
Layout = Callable[[Row], Iterator[Row]]
_HH = re.compile(r"\n\n(Human|Assistant):")
OFTEN = {
    "prompt": "question instruction query input problem context", "completion": "answer response output solution target",
    "chosen": "chosen_response preferred response_chosen better", "label": "score rating",
    "rejected": "rejected_response dispreferred response_rejected worse", "text": "content body document",
}
TRUTH = {"true": True, "false": False, "1": True, "0": False}


def layout(row: Row, role: Role, mapped: Mapping[str, str]) -> Layout:
    """The conversion that fits the columns of ``row`` (after mapping); UsageError that names what was found and what is known."""
    fits = [(columns, convert) for columns, convert in LAYOUTS[role].items() if set(columns.split()) <= row.keys()]
    if not fits:
        known = ", ".join(f"`{columns.replace(' ', '+')}`" for columns in LAYOUTS[role])
        raise UsageError(f"it has columns {sorted(row)}, none of the layouts for {role}",
                         hint=f"map them, for example --columns {_guess(row, role)}; expected {known}")
    return next((convert for columns, convert in fits if mapped.keys() & set(columns.split())), fits[0][1])


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """``row`` with each column of ``columns`` (our name -> its name) under our name; UsageError for one it does not have."""
    if not columns:
        return row
    if lacks := [theirs for theirs in columns.values() if theirs not in row]:
        raise UsageError(f"it has no column {lacks[0]!r}, only {sorted(row)}", hint="correct the column mapping")
    rest = {key: value for key, value in row.items() if key not in columns.values()}
    return rest | {ours: row[theirs] for ours, theirs in columns.items()}


def _guess(row: Row, role: Role) -> str:
    """A mapping to try: the columns of the role's plain layout, by the names that people give them."""
    wanted = {"sft": "prompt completion", "pref": "prompt chosen rejected", "text": "text"}.get(role, "prompt completion label")
    return ",".join(f"{ours}={next((theirs for theirs in OFTEN[ours].split() if theirs in row), '...')}"
                    for ours in wanted.split() if ours not in row)


# SFT


def _conversation(column: str) -> Layout:
    def convert(row: Row) -> Iterator[Row]:
        no_tools(row)
        given = messages(row[column], column)
        plain = _system(row, given)
        turns = row[column] if isinstance(row[column], list) else [row[column]]
        learnt = {i + len(plain) - len(given) for i, turn in enumerate(turns) if weight(turn)}
        answers = [i for i, turn in enumerate(plain) if turn["role"] == "assistant" and i and i in learnt]
        if not answers:
            raise UsageError(f"`{column}` has no assistant turn to learn", hint="drop such rows")
        for i in answers:
            if not plain[i]["content"].strip():
                raise UsageError(f"`{column}` has an empty answer")
            yield {"prompt": plain[:i], "completion": [plain[i]]}
    return convert


def _completion(row: Row) -> Iterator[Row]:
    prompt, completion = _asked(row, "completion")
    yield {"prompt": prompt, "completion": completion}


def _user(row: Row) -> Iterator[Row]:
    yield from _completion({"prompt": _said(row, "user"), "completion": _said(row, "assistant"),
                            "system": row.get("system") or ""})


def _alpaca(row: Row) -> Iterator[Row]:
    yield from _user({**_instruction(row), "assistant": row["output"]})


def _text(row: Row) -> Iterator[Row]:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise UsageError("`text` is empty or no string")
    yield {"text": row["text"]}


# Preference


def _pair(row: Row) -> Iterator[Row]:
    row = {**row, "chosen": _dialogue(row["chosen"]), "rejected": _dialogue(row["rejected"])}
    whole = "prompt" not in row or (isinstance(row["prompt"], str) and isinstance(row["chosen"], list))
    if whole:  # with a `prompt` string beside whole conversations (UltraFeedback binarized), the conversations say it all
        row |= dict(zip(("prompt", "chosen", "rejected"), _common_prompt(row["chosen"], row["rejected"]), strict=True))
    prompt, chosen = _asked(row, "chosen")
    _, rejected = _asked(row, "rejected")
    if chosen == rejected:
        raise UsageError("chosen and rejected are identical", hint="drop such rows: they carry no preference")
    yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _user_pair(row: Row) -> Iterator[Row]:
    yield from _pair({"prompt": _said(row, "user"), "chosen": row["chosen"], "rejected": row["rejected"],
                      "system": row.get("system") or ""})


def _alpaca_pair(row: Row) -> Iterator[Row]:
    yield from _user_pair({**row, **_instruction(row)})


def _sharegpt_pair(row: Row) -> Iterator[Row]:
    yield from _pair({"prompt": row["conversations"], **{key: row[key] for key in ("chosen", "rejected", "system", "tools")
                                                        if key in row}})


# Answers with a label


def _labelled(answers: Layout, *, scored: bool) -> Layout:
    def convert(row: Row) -> Iterator[Row]:
        label = row["label"]
        label = TRUTH.get(label.strip().lower(), label) if isinstance(label, str) else label
        number = isinstance(label, int | float) and 0 <= label <= 1
        if not number or (not scored and label not in (0, 1)):
            wanted = "a number from 0 to 1" if scored else "true or false"
            raise UsageError(f"`label` is {row['label']!r}, not {wanted}")
        for answer in answers(row):
            yield {**answer, "label": float(label) if scored else bool(label)}
    return convert


def _both(pairs: Layout) -> Layout:
    def convert(row: Row) -> Iterator[Row]:
        for pair in pairs(row):
            for key, label in (("chosen", True), ("rejected", False)):
                yield {"prompt": pair["prompt"], "completion": pair[key], "label": label}
    return convert


# Parts


def _asked(row: Row, answer: str) -> tuple[Any, Any]:
    """(prompt, answer) of a row, checked: both strings, or both messages."""
    no_tools(row)
    prompt, given = row["prompt"], row[answer]
    if isinstance(prompt, str) and isinstance(given, str):
        if not given.strip():
            raise UsageError(f"`{answer}` is empty")
        if not prompt.strip():
            raise UsageError("`prompt` is empty", hint="rows without a prompt have one column, `text`")
        if "system" not in row:
            return prompt, given
        prompt, given = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": given}]
    if not isinstance(prompt, str | list) or not isinstance(given, str | list | dict):
        raise UsageError(f"`prompt` and `{answer}` must be strings or lists of messages")
    if isinstance(prompt, str) or isinstance(given, str):
        raise UsageError(f"`prompt` and `{answer}` must both be strings or both be lists of messages")
    turns = _system(row, messages(prompt, "prompt"))
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise UsageError("`prompt` ends in an empty message")
    return turns, messages(given, answer, answer=True)


def _system(row: Row, turns: list[Row]) -> list[Row]:
    """``turns`` after what the `system` column says, if it says anything."""
    said = row.get("system")
    if said is not None and not isinstance(said, str):
        raise UsageError("`system` is no string")
    if not said or not said.strip():
        return turns
    if turns[0]["role"] == "system":
        raise UsageError("there is a system message and a `system` column", hint="keep one of them")
    return [{"role": "system", "content": said}, *turns]


def _said(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise UsageError(f"`{column}` is no string")
    return row[column]


def _instruction(row: Row) -> Row:
    """What an Alpaca row asks, as one user turn."""
    no_tools(row)
    if row.get("history"):
        raise UsageError("it has a `history`, which Alpaca's layout does not", hint="write such rows as `messages`")
    parts = [_said(row, "instruction"), row.get("input") or ""]
    if not isinstance(parts[1], str):
        raise UsageError("`input` is no string")
    return {"user": "\n\n".join(part for part in parts if part.strip()), "system": row.get("system")}


def _dialogue(answer: Any) -> Any:
    """HH-RLHF's text as messages; anything else as it is."""
    if not isinstance(answer, str) or not answer.startswith("\n\nHuman:"):
        return answer
    parts = _HH.split(answer)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The shared beginning of two conversations (TRL's implicit prompt); strings need an explicit one."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise UsageError("`prompt` is missing and cannot be told from plain strings", hint="add a `prompt` column")
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if not length:
        raise UsageError("`chosen` and `rejected` do not begin with the same message", hint="add a `prompt` column of messages")
    return chosen[:length], chosen[length:], rejected[length:]


_ANSWERS: dict[str, Layout] = {"prompt completion": _completion, "user assistant": _user, "instruction output": _alpaca}
_PAIRS: dict[str, Layout] = {
    "prompt chosen rejected": _pair, "user chosen rejected": _user_pair, "instruction chosen rejected": _alpaca_pair,
    "conversations chosen rejected": _sharegpt_pair, "chosen rejected": _pair,
}


def _with_labels(scored: bool) -> dict[str, Layout]:
    return {f"{columns} label": _labelled(convert, scored=scored) for columns, convert in _ANSWERS.items()} | {
        columns: convert if scored else _both(convert) for columns, convert in _PAIRS.items()}


LAYOUTS: dict[Role, dict[str, Layout]] = {
    "sft": {"messages": _conversation("messages"), "conversations": _conversation("conversations"), **_ANSWERS, "text": _text},
    "pref": _PAIRS, "unpaired": _with_labels(scored=False), "scored": _with_labels(scored=True), "text": {"text": _text},
}
