"""The README's commands run as they stand, and the paths and figures that it names exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from clikit import World
from conftest import AdapterFactory

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


def test_merging(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the block on merging, on tiny models under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("sft", "dpo"), 1):
        shutil.copytree(make_adapter(tiny_base, seed), name)
    shutil.copytree(tiny_base, "org/base")
    assert invoke(["merge", "sft", "--method", "task_arithmetic", "-o", "org/tuned"]) == 0
    Path("mergekit-config.yml").write_text(
        "merge_method: ties\nbase_model: org/base\nmodels:\n- model: org/base+sft\n  parameters: {weight: 1, density: 0.5}\n")
    found = commands(block_with("--rounding stochastic"))
    assert len(found) == 7
    for arguments in found:
        assert invoke([*arguments, "--overwrite"]) == 0, (arguments, capsys.readouterr().err)
        assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_reports(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the block on reports, on tiny adapters under the names that it uses."""
    world = World(tiny_base, make_adapter, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, path in (("sft", world.one), ("dpo", world.two), ("org/base", tiny_base)):
        shutil.copytree(path, name)
    found = commands(block_with("paft interference sft dpo"))
    assert len(found) == 4
    for arguments in found:
        assert invoke(arguments) == 0, (arguments, capsys.readouterr().err)
        assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []
    assert all(Path(name).is_file() for name in ("report.html", "layers.png", "meeting.html"))


def test_every_file_and_method_that_it_names_exists() -> None:
    assert "@@" not in README
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for method in names():
        assert method in README
    tree = re.findall(r"^  ([a-z_0-9]+(?:\.py|/))", README, re.MULTILINE)
    assert len(tree) > 10
    assert all((ROOT / "paft" / entry).exists() for entry in tree)
