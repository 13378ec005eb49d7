"""`paft merge --resume`: finished files are taken as they are, of this very merge alone; the result is the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clikit import Capture
from conftest import AdapterFactory

from paft.cli import invoke
from paft.merge import shards as shards_of_merge
from paft.merge import writer
from paft.merge.shards import Shards
from paft.merge.tally import Tally
from paft.verify import verify_tree

ROOT = Path(__file__).resolve().parents[1]
STRIKE = """
import os, signal, sys, time
from pathlib import Path
from paft.cli import main
from paft.merge import writer
real, record = writer._write_one, Path(os.environ["RECORD"])
def strike(entry, place, merged):
    if entry.file.name.startswith("model-00003"):
        for _ in range(400):
            if record.is_file() and record.read_text().count("tallies") >= 2:
                os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
                break  # a second one would interrupt what the first began
            time.sleep(0.05)
    return real(entry, place, merged)
writer._write_one = strike
sys.argv[0] = "paft"
main()
"""


@pytest.fixture
def command(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> list[str]:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base, max_shard_size="25KB")
    assert len(list(base.glob("*.safetensors"))) >= 4
    one, two = make_adapter(tiny_base, 1), make_adapter(tiny_base, 2)
    return ["merge", str(one), str(two), "--base", str(base), "--method", "dare_ties", "-p", "density=0.5", "--no-check",
            "--json", "-q", "-o", str(tmp_path / "out")]


def struck(command: list[str], out: Path, name: str) -> subprocess.CompletedProcess[str]:
    record = out.parent / ".out.partial" / "shards.json"
    done = subprocess.run([sys.executable, "-c", STRIKE, *command, "--resume"], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "RECORD": str(record), "SIGNAL": name})
    assert not out.exists()
    return done


def tensors_of(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.name not in ("paft.json", "README.md")}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_resumed_merge_writes_the_rest_and_is_the_same(name: str, command: list[str], tmp_path: Path, capsys: Capture,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke([*command[:-1], str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    done = struck(command, tmp_path / "out", name)
    assert done.returncode == (-signal.SIGKILL if name == "SIGKILL" else 143), done.stderr
    assert name == "SIGKILL" or "--resume goes on from there" in done.stderr
    real, made = writer._write_one, []

    def counted(entry, place, merged):  # type: ignore[no-untyped-def]
        made.append(entry.file.name)
        return real(entry, place, merged)

    monkeypatch.setattr(writer, "_write_one", counted)
    assert invoke([*command, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert made and "model-00001" not in {file[:11] for file in made}
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "whole") and verify_tree(tmp_path / "out")["ok"]
    for key in ("adapters", "sign_conflicts", "merged_norm", "rounding", "tensors"):
        assert again[key] == whole[key], key
    assert not (tmp_path / ".out.partial").exists()


def test_the_record_grows_with_the_tensors_and_not_with_their_rows(tmp_path: Path) -> None:
    """With a number a row it was megabytes, written anew after each file: a merge of 8B took twice as long."""
    delta, sizes = torch.ones(1, 1), []
    for rows in (10, 10_000):
        tally = Tally(["one"])
        for _ in range(rows):
            tally.rounded(delta, delta)
        tally.close()
        assert tally.report()["merged_norm"] == pytest.approx(rows**0.5)
        shards = Shards(tmp_path / "shards.json", "key", {"w": tally})
        shards.finish("file", {}, {"w": ("BF16", (rows, 1), "0" * 64)})
        sizes.append(shards.file.stat().st_size)
    assert sizes[1] < 1.2 * sizes[0] < 2000


@pytest.mark.parametrize("spoil", ["recipe", "byte", "base", "record", "no resume"])
def test_what_is_not_of_this_merge_is_written_again(spoil: str, command: list[str], tmp_path: Path, capsys: Capture,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    struck(command, tmp_path / "out", "SIGKILL")
    partial, more = tmp_path / ".out.partial", ["--resume"]
    if spoil == "recipe":
        more += ["--seed", "7"]
    elif spoil == "byte":
        for file in (partial / "out").glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    elif spoil == "base":
        os.utime(next((tmp_path / "base").glob("model-00001*")), ns=(1, 1))
    elif spoil == "record":
        (partial / "shards.json").write_text('{"key": 1, "files": ')
    else:
        more = []
    opened = []
    real = shards_of_merge.Shards.open.__func__  # type: ignore[attr-defined]

    def spy(cls, *arguments):  # type: ignore[no-untyped-def]
        opened.append(real(cls, *arguments))
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(shards_of_merge.Shards, "open", classmethod(spy))
        patch.setattr(shards_of_merge.Shards, "finish", lambda *a: None)
        assert invoke([*command, *more]) == 0
    assert opened[0].done == {}
    assert invoke([*command[:-1], str(tmp_path / "whole"), *more[1:]]) == 0
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "whole")


def test_a_finished_merge_is_taken_as_it_is_and_another_is_refused(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert invoke([*command, "--resume"]) == 0
    first, stamp = json.loads(capsys.readouterr().out), (tmp_path / "out").stat().st_ino
    assert invoke([*command, "--resume"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == first and not again.err
    room = tmp_path / ".out.partial"
    room.mkdir()
    (room / "shards.json").write_text("{}")  # a process was killed after the rename
    assert invoke([*(word for word in command if word != "-q"), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().err and not room.exists()
    assert (tmp_path / "out").stat().st_ino == stamp
    assert invoke(command) == 3 and "not empty" in capsys.readouterr().err
    for more, said in ((["--seed", "7"], "seed"), (["-p", "density=0.4"], "parameters"), (["--dtype", "float16"], "dtype")):
        assert invoke([*command, "--resume", *more]) == 3
        assert f"its {said} differs" in capsys.readouterr().err
    config = Path(command[1]) / "adapter_config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 16'))
        assert invoke([*command, "--resume"]) == 3
        assert "its inputs differs" in capsys.readouterr().err
    finally:
        config.write_text(text)
    file = next((tmp_path / "base").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert invoke([*command, "--resume"]) == 3
    assert "its base differs" in capsys.readouterr().err and (tmp_path / "out").stat().st_ino == stamp


def test_only_whole_models_of_our_own_engine_are_resumed(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    for more in (["--output-kind", "delta"], ["--engine", "mergekit"]):
        plain = [each for each in command if each != "--no-check"]
        assert invoke([*plain, "--resume", *more]) == 2
        assert not (tmp_path / "out").exists()
