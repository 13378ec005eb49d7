"""`--devices N` and the shipped accelerate configs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from test_train_stage import write_rows
from trainkit import distance, saved, sft_rows

from paft.cli import invoke
from paft.errors import NotFoundError, ResourceError
from paft.launch import config, environment, launch, launched
from paft.models import free_cores

PAFT = [sys.executable, "-m", "paft"]
ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"max_steps": 3, "logging_steps": 1, "warmup_steps": 0, "learning_rate": 0.1, "optim": "sgd"}


def command(base: Path, data: str, out: Path, **options: Any) -> list[str]:
    sets = [part for key, value in {**OPTIONS, **options}.items() for part in ("--set", f"trainer.{key}={value}")]
    return ["train-sft", "-m", str(base), "-d", data, "--l1", "1e-4", *sets, "-o", str(out)]


def paft(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PAFT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_environment_is_what_accelerate_makes_of_the_config() -> None:
    given = ["--config_file", str(config("fsdp2")), "--num_processes", "2", "-m", "paft"]
    theirs = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(given))[0])
    ours = environment("fsdp2")
    assert ours["FSDP_VERSION"] == "2" and ours["ACCELERATE_USE_FSDP"] == "true"
    assert {name: theirs.get(name) for name in ours} == ours
    assert environment("ddp") == {}


def test_the_configs_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "paft.launch", "fsdp2"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == config("fsdp2")
    with pytest.raises(NotFoundError) as caught:
        config("fsdp1")
    assert caught.value.hint == "did you mean 'fsdp2'?"


def test_more_devices_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    count = free_cores() + 1
    with pytest.raises(ResourceError, match=rf"--devices {count}: this machine has no GPU, and {count - 1} CPU cores"):
        launch([], count)
    assert invoke(["train-sft", "-m", "demo", "-d", "demo:sft", "--fsdp"]) == 2
    assert "add --devices" in capsys.readouterr().err


def test_under_another_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not launched(2), "of a pod, not of a process"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launched(None) and launched(4)
    assert invoke(["train-sft", "-m", "demo", "-d", "demo:sft", "--devices", "2"]) == 2
    assert "started 4 processes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(free_cores() < 2, reason="a process a core")
def test_one_output_whatever_the_number_of_processes(tiny_base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(4, answer=None))
    two = command(tiny_base, data, tmp_path / "two", per_device_train_batch_size=2)
    done = paft(*two, "--devices", "2", "--fsdp")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("3 steps") == 1
    assert invoke([*command(tiny_base, data, tmp_path / "one", per_device_train_batch_size=4), "-q"]) == 0
    assert distance(saved(tmp_path / "one"), saved(tmp_path / "two")) < 1e-6
    again = paft(*two, "--devices", "2")
    assert again.returncode == 3 and not again.stdout
    said = [f"error: {tmp_path / 'two'} is not empty", "  try: choose another -o DIR, or pass --overwrite"]
    assert again.stderr.splitlines() == said


@pytest.mark.slow
@pytest.mark.skipif(free_cores() < 2, reason="a process a core")
def test_an_interrupt_reaches_all_and_leaves_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(4, answer=None))
    out = tmp_path / "out"
    long = command(tiny_base, data, out, per_device_train_batch_size=2, max_steps=100_000, save_steps=2, logging_steps=1000)
    with subprocess.Popen([*PAFT, *long, "--devices", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        until = time.monotonic() + 300
        while not list(tmp_path.glob("out.partial/checkpoint-*/progress.json")) and time.monotonic() < until:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=120)
    assert running.returncode == 130
    assert told.count("error: ") == 1 and "keeps step" in told and "--resume goes on" in told
    assert not out.exists() and list(tmp_path.glob("out.partial/checkpoint-*/progress.json"))
    assert os.environ.get("PAFT_PARENT") is None
