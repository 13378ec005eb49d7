"""A Ray cluster of three nodes in this machine, one core each, parts of which are killed: the results are the undisturbed ones.

`make test-cluster`; the cluster has a token and a directory of its own and is no other's to join.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.cluster]
ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180.0
NODE = ["--block", "--num-cpus", "1", "--memory", "4000000000", "--object-store-memory", "80000000", "--node-ip-address",
        "127.0.0.1"]


def until(true: Callable[[], Any], what: str) -> Any:
    """Wait for something, however slow the machine."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.02)
    return found


@dataclass
class Cluster:
    """A head and its nodes; what they are started with, a driver needs too."""

    room: Path
    address: str
    env: dict[str, str]
    nodes: list[subprocess.Popen[bytes]]

    def start(self, *words: str, before: tuple[str, ...] = ()) -> None:
        """A node, with a directory of its own for what it fetches from URLs."""
        ray = Path(sys.executable).with_name("ray")
        env = {**self.env, "PAFT_CACHE": str(self.caches / str(len(self.nodes)))}
        self.nodes.append(subprocess.Popen([*before, str(ray), "start", *words, *NODE], env=env, cwd=ROOT,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True))

    @property
    def caches(self) -> Path:
        return self.room / "caches"

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            try:
                node.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)

    def paft(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "paft", *words, "--executor", "ray", "--address", self.address],
                                env=self.env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def count(self) -> int:
        script = ("import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='CRITICAL'); "
                  "print(sum(node['Alive'] for node in ray.nodes()))")
        done = subprocess.run([sys.executable, "-c", script, self.address], env=self.env, capture_output=True, text=True)
        return int(done.stdout or 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    room = Path(tempfile.mkdtemp(prefix="paft-ray-", dir="/tmp"))  # Ray's sockets lie below it, and their names are limited
    (room / "token").write_text(secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(room / "token")}
    made = Cluster(room, f"127.0.0.1:{port}", env, [])
    try:
        made.start("--head", "--port", str(port), "--include-dashboard=false", "--temp-dir", str(room / "ray"))
        until(lambda: listens(port), "the head")
        for count in (2, 3):  # one after the other: two nodes that start at once in one machine take the same ports
            made.start("--address", made.address)
            until(lambda count=count: made.count() == count, "a node")
        yield made
    finally:
        made.stop()
        shutil.rmtree(room, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def recipe_of(folder: Path, base: Path, steps: int) -> Path:
    own = {"lora": {"r": 2, "alpha": 4}, "trainer": {"max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1,
                                                     "save_strategy": "steps", "save_steps": 3}}
    sft, pref = write_jsonl(folder / "s.jsonl", chat_rows(60)), write_jsonl(folder / "p.jsonl", pair_rows(60))
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps({
        "kind": "run", "name": "tiny", "model": str(base), "data": {"sft": str(sft), "pref": str(pref)},
        "defaults": {"sft": own, "dpo": own}, "evaluate": {"split": "test", "rows": 6},
        "train": {"sft": {"objective": "sft"}, "dpo": {"objective": "dpo"}, "both": {"objective": "dpo", "on": "sft"}},
        "merge": {"ties": {"of": ["sft", "dpo"], "method": "ties", "parameters": {"density": 0.5}}}}))
    return recipe


@pytest.fixture(scope="module")
def local(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and what it gives in this machine."""
    folder = tmp_path_factory.mktemp("local")
    recipe = recipe_of(folder, tiny_base, 40)
    line = [sys.executable, "-m", "paft", "run", str(recipe), "-o", str(folder / "out"), "-q", "--workers", "1"]
    subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return recipe, folder / "out"


def same(out: Path, local: Path) -> None:
    for file in local.rglob("*.safetensors"):
        assert (out / file.relative_to(local)).read_bytes() == file.read_bytes(), file
    assert json.loads((out / "report.json").read_text())["rows"] == json.loads((local / "report.json").read_text())["rows"]
    assert not list(out.rglob("*.partial"))


def process(log: Path) -> int:
    """Of the job that last wrote a log."""
    found = re.findall(r"process (\d+)$", log.read_text(), flags=re.M) if log.exists() else []
    return int(found[-1]) if found else 0


def finish(command: subprocess.Popen[str]) -> str:
    _, said = command.communicate(timeout=PATIENCE)
    assert command.returncode == 0, said
    return said


def test_a_worker_killed_in_each_stage_goes_on_from_its_checkpoint(cluster: Cluster, local: tuple[Path, Path],
                                                                   tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = cluster.paft("run", str(local[0]), "-o", str(out))
    try:
        for stage in ("dpo", "both"):
            until(lambda stage=stage: list((out / "adapters" / f"{stage}.partial").glob("checkpoint-*/progress.json")), stage)
            os.kill(process(out / "logs" / f"{stage}.log"), signal.SIGKILL)
        until(lambda: process(out / "logs" / "evaluate.log"), "the evaluation")
        os.kill(process(out / "logs" / "evaluate.log"), signal.SIGKILL)
        assert "ray: 3 nodes, 3 CPUs" in finish(command)
    finally:
        command.kill()
    for stage in ("dpo", "both"):
        log = (out / "logs" / f"{stage}.log").read_text()
        assert log.count("process") == 2 and re.search(r"resuming at step \d+", log)
    same(out, local[1])


def test_nodes_that_share_no_disk(cluster: Cluster, tiny_base: Path, tmp_path: Path) -> None:
    """All they share is a URL; the node that trains dies with its disk, and another goes on from the checkpoint there."""
    recipe, bucket = str(recipe_of(tmp_path, tiny_base, 40)), tmp_path / "bucket"
    line = ["run", recipe, "--set", "train.both.trainer.max_steps=400"]
    done = subprocess.run([sys.executable, "-m", "paft", *line, "-q", "--workers", "1", "-o", str(tmp_path / "here")], cwd=ROOT,
                          check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = cluster.paft(*line, "-o", f"file://{bucket}")
    try:
        until(lambda: (bucket / "adapters" / "both.partial" / ".paft-files.json").is_file(), "a checkpoint behind the URL")
        logs = list(cluster.caches.glob("*/trees/*/logs/both.log"))
        assert len(logs) == 1 and len(list(cluster.caches.iterdir())) > 1
        os.kill(process(logs[0]), signal.SIGKILL)
        shutil.rmtree(logs[0].parents[3])  # all that the node had
        finish(command)
    finally:
        command.kill()
    assert re.search(r"resuming at step \d+", (bucket / "logs" / "both.log").read_text())
    same(bucket, tmp_path / "here")


def test_a_driver_that_dies_is_started_again_and_goes_on(cluster: Cluster, local: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = cluster.paft("run", str(local[0]), "-o", str(out))
    try:
        until(lambda: list((out / "adapters" / "both.partial").glob("checkpoint-*/progress.json")), "the last training")
    finally:
        command.kill()
    command.communicate()
    done = {file: file.stat().st_mtime_ns for file in (out / "adapters").glob("*/paft.json")}
    assert out / "adapters" / "sft" / "paft.json" in done and out / "adapters" / "both" / "paft.json" not in done
    finish(cluster.paft("run", str(local[0]), "-o", str(out), "--resume"))
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert re.search(r"resuming at step \d+", (out / "logs" / "both.log").read_text())
    same(out, local[1])


def test_seeds_at_once_and_a_search_by_several(cluster: Cluster, local: tuple[Path, Path], tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    command = cluster.paft("compare", str(local[0]), "--seeds", "2", "-o", str(seeds))
    try:
        until(lambda: process(seeds / "seed-0" / "logs" / "sft.log"), "a stage of the first seed")
        os.kill(process(seeds / "logs" / "seed-0.log"), signal.SIGKILL)  # the task that waits for the stages
        finish(command)
    finally:
        command.kill()
    same(seeds / "seed-0", local[1])
    assert json.loads((seeds / "compare.json").read_text())["seeds"] == [0, 1]
    finish(cluster.paft("search", str(local[1]), "--trials", "6", "--workers", "2", "-o", str(tmp_path / "found")))
    trials = json.loads((tmp_path / "found" / "front.json").read_text())["trials"]
    assert 6 <= trials <= 7  # a worker that has begun one ends it
    assert {file.stem for file in (tmp_path / "logs").iterdir()} == {"found-1", "found-2"}


def test_a_merge_by_three_workers(cluster: Cluster, tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base, max_shard_size="25KB")
    inputs = [str(make_adapter(tiny_base, 1)), str(make_adapter(tiny_base, 2))]
    for number, more in enumerate((["ties", "-p", "scope=global", "-p", "density=0.3"], ["dare_ties", "-p", "density=0.5"])):
        line = ["merge", *inputs, "--base", str(base), "--no-check", "-q", "--method", *more]
        here, there = tmp_path / f"here-{number}", tmp_path / f"there-{number}"
        subprocess.run([sys.executable, "-m", "paft", *line, "-o", str(here)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        finish(cluster.paft(*line, "-o", str(there)))
        made = {file.name: file.read_bytes() for file in there.glob("*.safetensors")}
        assert len(made) >= 4 and made == {file.name: file.read_bytes() for file in here.glob("*.safetensors")}


def test_the_slurm_job_starts_a_cluster_and_runs_on_it(local: tuple[Path, Path], tmp_path: Path) -> None:
    """docs/jobs/ray.sbatch with a Slurm of one machine: `scontrol` and `srun` are a line each."""
    srun = 'while [[ "$1" == -* ]]; do [[ "$1" == -w ]] && shift; shift; done; exec "$@"'
    for name, text in (("scontrol", "echo 127.0.0.1"), ("srun", srun), ("paft", f'exec {sys.executable} -m paft "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    found = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": found, "SLURM_JOB_NODELIST": "one", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid()),
           "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    job = ["bash", str(ROOT / "docs/jobs/ray.sbatch"), "run", str(local[0]), "-o", str(tmp_path / "out")]
    done = subprocess.run(job, cwd=ROOT, env=env, text=True, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    same(tmp_path / "out", local[1])


def test_without_the_token_of_the_cluster_it_is_one_line(cluster: Cluster, local: tuple[Path, Path], tmp_path: Path) -> None:
    cluster_env, cluster.env = cluster.env, {**cluster.env, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    (tmp_path / "other").write_text(secrets.token_hex(32))
    try:
        command = cluster.paft("run", str(local[0]), "-o", str(tmp_path / "out"))
    finally:
        cluster.env = cluster_env
    _, said = command.communicate(timeout=PATIENCE)
    assert command.returncode == 5 and "RAY_AUTH_TOKEN_PATH=FILE" in said and not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="another view of the disk needs root")
def test_a_node_that_sees_another_disk(cluster: Cluster, local: tuple[Path, Path], tmp_path: Path) -> None:
    view = f"mount -t tmpfs none {tmp_path} && mkdir {tmp_path}/out && exec \"$@\""
    cluster.start("--address", cluster.address, before=("unshare", "-m", "sh", "-c", view, "sh"))
    try:
        until(lambda: cluster.count() == 4, "the fourth node")
        command = cluster.paft("run", str(local[0]), "-o", str(tmp_path / "out"))
        _, said = command.communicate(timeout=PATIENCE)
    finally:
        node = cluster.nodes.pop()
        node.terminate()
        node.wait(60)
    assert command.returncode == 5 and "is not seen here" in said and "shared disk" in said
