"""The command line as a user meets it: results on stdout, progress on stderr, help that fits, processes that end well."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory

from paft.cli import cli, invoke

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def test_training_tells_its_result_on_stdout_and_progress_on_stderr(world: World, capsys: Capture) -> None:
    assert invoke(world.train("--l1", "1e-3", "--eval-fraction", "0.25", "--json")) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert result["recipe"]["l1"] == 1e-3 and result["metrics"]["steps"] == 2 and result["out"] == str(world.out)
    assert {"task_loss", "l1", "eval_loss", "l1_relative", "share_below_1e-5"} <= result["metrics"].keys()
    assert {file.name for file in world.out.iterdir()} > {
        "adapter_model.safetensors", "adapter_config.json", "paft.json", "README.md",
    }
    assert invoke(["verify", str(world.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert invoke(world.train()) == 3
    capsys.readouterr()
    assert invoke(world.train("--overwrite")) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("next: paft ") and "error" not in err
    assert all(len(line) <= 80 or str(world.out) in line for line in out.splitlines())


def test_merging_and_verifying(world: World, capsys: Capture) -> None:
    assert invoke(world.merge("--dry-run")) == 0
    assert capsys.readouterr().out.startswith("would merge 2 inputs by ties") and not world.out.exists()
    assert invoke(world.merge("--method", "ties", "-p", "density=0.5", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "ties"
    assert invoke(["verify", str(world.out)]) == 0
    file = world.out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert invoke(["verify", str(world.out)]) == 3
    out, err = capsys.readouterr()
    assert out == "tensor model.norm.weight in model.safetensors has changed\n" and "is not what paft.json describes" in err


def test_scores_and_reports(world: World, capsys: Capture) -> None:
    data = ["--sft-data", str(world.chat), "--pref-data", str(world.pairs)]
    assert invoke(["eval", str(world.one), *data, "--base", str(world.base), "--json", "--rows", "4", "-q"]) == 0
    out, err = capsys.readouterr()
    base, one = json.loads(out)
    assert base["pref_accuracy"] == 0.5 and base["name"] == str(world.base) and one["sft_loss"] > 0
    assert err == ""
    assert invoke(["sparsity-report", str(world.one), str(world.two), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert invoke(["sparsity-report", str(world.one)]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines() if str(world.one) not in line)


def test_methods_explain_themselves(capsys: Capture) -> None:
    assert invoke(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(len(line) < 80 for line in listed.splitlines()) and "..." not in listed
    assert invoke(["methods", "--json"]) == 0
    names = [one["name"] for one in json.loads(capsys.readouterr().out)]
    assert {"linear", "task_arithmetic", "ties", "slerp", "dare_linear", "dare_ties"} <= set(names)
    assert all(name in listed for name in names)
    assert invoke(["methods", "ties"]) == 0
    out = capsys.readouterr().out
    assert "-p density=" in out and "2306.01708" in out
    assert invoke(["methods", "tise"]) == 2
    assert "did you mean 'ties'?" in capsys.readouterr().err


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(["recipes", "ls"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("sft-l1", "dpo", "ties", "demo", "paft"))
    assert all(len(line) < 80 for line in out.splitlines())
    assert invoke(["recipes", "show", "ties"]) == 0
    shown = capsys.readouterr().out
    assert invoke(["recipes", "cp", "ties"]) == 0
    assert (tmp_path / "ties.yaml").read_text() == shown
    assert "paft merge -c ties.yaml" in capsys.readouterr().out
    assert_one_error(capsys, invoke(["recipes", "cp", "ties"]), 3, "exists")
    assert_one_error(capsys, invoke(["recipes", "cp", "ties", "no/where.yaml"]), 4, "no")
    assert_one_error(capsys, invoke(["recipes", "show", "tise"]), 4, "tise")


COMMANDS = [[], *([name] for name in cli.commands), *(["recipes", name] for name in ("ls", "show", "cp"))]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_the_terminal(command: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert invoke([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) < 80 for line in out.splitlines())
    assert not any(line.rstrip().endswith("...") for line in out.splitlines() if line.startswith("  "))


def test_no_arguments_is_help(capsys: Capture) -> None:
    assert invoke([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Usage: paft") and "error" not in err


def test_a_bug_asks_for_a_report_and_traceback_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("paft.cli.system.catalog", broken)
    assert_one_error(capsys, invoke(["recipes", "ls"]), 1, "ZeroDivisionError: two")
    assert invoke(["recipes", "ls", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


# Processes

STRIKE = """
import os, signal, sys
from paft.cli import invoke
from paft.train import callbacks
step_end = callbacks.Watch.on_step_end
def strike(self, args, state, control, **kwargs):
    step_end(self, args, state, control, **kwargs)
    if state.global_step == 1:
        os.kill(os.getpid(), signal.SIGINT)
callbacks.Watch.on_step_end = strike
sys.exit(invoke(sys.argv[1:]))
"""


def test_an_interrupt_in_training_leaves_nothing(world: World) -> None:
    before = sorted(world.folder.rglob("*"))
    done = subprocess.run([sys.executable, "-c", STRIKE, *world.train()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130
    assert done.stdout == "" and done.stderr.split() == "error: interrupted; nothing half-made was kept".split()
    assert sorted(world.folder.rglob("*")) == before


STOP = """
import os, signal, sys
from paft.cli import main
from paft.merge import writer
copy = writer.write_companions
def stop(*args):
    os.kill(os.getpid(), getattr(signal, os.environ["STOP"]))
    copy(*args)
writer.write_companions = stop
sys.argv[0] = "paft"
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_merge_leaves_nothing(world: World, name: str) -> None:
    before = sorted(world.folder.rglob("*"))
    done = subprocess.run([sys.executable, "-c", STOP, *world.merge()], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "STOP": name})
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stdout == "" and done.stderr.split() == "error: interrupted; nothing half-made was kept".split()
    assert sorted(world.folder.rglob("*")) == before


def test_a_failed_write_without_a_name_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("paft.cli.system.catalog", broken)
    assert_one_error(capsys, invoke(["recipes", "ls"]), 5, "input/output error")


def test_a_closed_pipe_is_no_error() -> None:
    line = f"{sys.executable} -m paft recipes ls | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] in ("0", "1") and done.stderr == ""
