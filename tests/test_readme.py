"""The README's commands run as they stand, and the paths and figures that it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from paft.cli import invoke
from paft.merge.methods import names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(block: str) -> list[list[str]]:
    """Each `paft ...` line of a block as arguments, comments and continuation lines resolved."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("paft ")]


def block_with(text: str) -> str:
    found = [block for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) if text in block]
    assert len(found) == 1, f"one block of the README contains {text!r}"
    return found[0]


def test_stage_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in commands(block_with("paft verify")):
        assert invoke(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "merges/my-ties/model.safetensors").is_file()
    assert "verdict" in capsys.readouterr().out


def test_your_own_model_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing's command line, with the embedded world in the place of a hub model."""
    monkeypatch.chdir(tmp_path)
    (arguments,) = commands(block_with("paft run paft"))
    swap = {"model=Qwen/Qwen2.5-0.5B": "model=demo", "data.sft=chat.jsonl": "data.sft=demo:sft",
            "data.pref=pairs.jsonl": "data.pref=demo:pref"}
    assert swap.keys() <= set(arguments)
    assert invoke([swap.get(word, word) for word in arguments] + ["--dry-run"]) == 0
    assert "would run" in capsys.readouterr().out


def test_every_file_and_method_that_it_names_exists() -> None:
    assert "@@" not in README
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for method in names():
        assert method in README
    tree = re.findall(r"^  ([a-z_0-9]+(?:\.py|/))", README, re.MULTILINE)
    assert len(tree) > 10
    assert all((ROOT / "paft" / entry).exists() for entry in tree)
