"""Chat templates are programs, and often a stranger's: they come to an end, in bounded time and memory, or are refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from clikit import Capture, assert_one_error
from conftest import CHAT_TEMPLATE
from datakit import chat_rows, write_jsonl

from paft import bounded
from paft.cli import invoke
from paft.data.template import LARGEST
from paft.models import load_tokenizer

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "nested loops": LOOP,
    "a long power": "{% if 9 ** (9 ** 9) %}{% endif %}",
    "a text that doubles": "{% set t = namespace(x='a') %}{% for i in range(40) %}{% set t.x = t.x ~ t.x %}{% endfor %}{{ t.x }}",
    "a wide format": "{{ '%999999999d' % 1 }}{{ '%999999999d' % 1 }}",
    "a text of a hundred megabytes": "{{ 'a' * 100000000 }}",
    "a number that overflows": "{{ 'a' * (10 ** 30) }}",
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)


def base_with(template: str, tiny_base: Path, folder: Path) -> Path:
    base = Path(shutil.copytree(tiny_base, folder / "base"))
    (base / "chat_template.jinja").write_text(template)
    return base


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_refused(name: str, tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    base = base_with(HOSTILE[name] + CHAT_TEMPLATE, tiny_base, tmp_path)
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    started = time.process_time()
    code = invoke(["train-sft", "-m", str(base), "-d", str(data), "-o", str(tmp_path / "out"), "-q"])
    assert_one_error(capsys, code, 3, "the chat template of")
    assert not (tmp_path / "out").exists() and time.process_time() - started < 5


def test_a_chosen_template_without_end_is_refused(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    (tmp_path / "x.jinja").write_text(LOOP + CHAT_TEMPLATE)
    code = invoke(["train-sft", "-m", str(tiny_base), "-d", str(data), "-o", str(tmp_path / "out"), "-q",
                   "--chat-template", str(tmp_path / "x.jinja")])
    assert_one_error(capsys, code, 2, "is no chat template")


def test_a_template_that_waits_for_a_row_is_refused_with_it(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    template = "{% if 'eleven' in messages[0]['content'] %}" + LOOP + "{% endif %}" + CHAT_TEMPLATE
    base = base_with(template, tiny_base, tmp_path)
    load_tokenizer(str(base))
    rows = chat_rows(8)
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "rows.jsonl").write_text(text + "\n" + json.dumps(rows[0]).replace('"content": "', '"content": "eleven ', 1))
    code = invoke(["train-sft", "-m", str(base), "-d", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out"), "-q"])
    assert_one_error(capsys, code, 3, "takes more than")


def test_files_too_large_for_a_template_or_a_config_are_refused(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    base = base_with(" " * (LARGEST + 1), tiny_base, tmp_path)
    code = invoke(["train-sft", "-m", str(base), "-d", str(data), "-o", str(tmp_path / "out"), "-q"])
    assert_one_error(capsys, code, 3, "chat_template.jinja is larger than 1 MB")
    code = invoke(["train-sft", "-m", str(tiny_base), "-d", str(data), "-o", str(tmp_path / "out"), "-q",
                   "--chat-template", str(base / "chat_template.jinja")])
    assert_one_error(capsys, code, 2, "is larger than 1 MB")


def test_what_ends_may_fail_and_its_error_comes_again() -> None:
    assert bounded.tried(lambda: None) is None
    assert bounded.tried(lambda: 1 / 0) is None  # the caller meets it himself
    assert bounded.tried(lambda: bytearray(2 * bounded.MEMORY)) == "needs more than 1 GB of memory"
