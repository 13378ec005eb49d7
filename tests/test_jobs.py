"""The pages on clusters and scale: job files run or parse, their command lines are paft's, the tables the script's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_train_stage import write_rows
from trainkit import distance, saved, sft_rows

from paft.cli import cli, invoke
from paft.models import free_cores

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "docs" / "jobs"
SRUN = """#!/bin/bash
# Two "machines" on this one; the options of srun end at the command.
while [[ $1 == -* ]]; do shift; done
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & pids+=($!); done
code=0; for pid in "${pids[@]}"; do wait "$pid" || code=$?; done; exit $code
"""


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a pod's spec; what they mount is declared beside them, and a GPU is a limit."""
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert all(int(str(count)) > 0 for name, count in container["resources"]["limits"].items() if "gpu" in name)
    return pod["containers"]


def parsed(line: list[str]) -> dict[str, Any]:
    """The options of a command line of paft's; click refuses what it does not know."""
    assert line[0] == "paft"
    command = cli.commands[line[1]]
    return command.make_context(line[1], list(line[2:])).params


def test_the_kubernetes_jobs_are_whole() -> None:
    job = yaml.safe_load((JOBS / "train.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    (container,) = containers(job["spec"]["template"]["spec"])
    assert job["spec"]["template"]["spec"]["restartPolicy"] in ("OnFailure", "Never")
    options = parsed(container["command"])
    assert options["devices"] == int(container["resources"]["limits"]["nvidia.com/gpu"]) and options["resume"] and options["fsdp"]

    ray = yaml.safe_load((JOBS / "ray.yaml").read_text())
    assert (ray["apiVersion"], ray["kind"]) == ("ray.io/v1", "RayJob")
    cluster = ray["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert containers(group["template"]["spec"]) and isinstance(group["rayStartParams"], dict)
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    _of_ray(shlex.split(ray["spec"]["entrypoint"]))


def _of_ray(line: list[str]) -> None:
    known = {option for parameter in cli.commands["run"].params for option in parameter.opts}
    assert {part for part in line if part.startswith("-")} <= known


def test_the_sky_task_is_whole() -> None:
    task = yaml.safe_load((JOBS / "sky.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "file_mounts", "setup", "run"}
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
    parsed(["paft", *shlex.split(task["run"].partition("-m paft ")[2])])


@pytest.mark.parametrize("file", sorted(JOBS.glob("*.sbatch")), ids=lambda file: file.name)
def test_the_slurm_jobs_are_whole(file: Path) -> None:
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    lines = file.read_text().splitlines()
    head = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[0] == "#!/bin/bash" and all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in head)
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "Slurm reads no options below a command"


@pytest.mark.slow
@pytest.mark.skipif(free_cores() < 2, reason="a process a core")
def test_the_slurm_training_runs(tiny_base: Path, tmp_path: Path) -> None:
    """Its body, with Slurm's variables set by hand: two machines on the loopback, one process each."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\necho localhost\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(4, answer=None))
    sets = ["max_steps=2", "warmup_steps=0", "learning_rate=0.1", "optim=sgd"]
    command = ["train-sft", "-m", str(tiny_base), "-d", data, *(part for each in sets for part in ("--set", f"trainer.{each}"))]
    size = ["--set", "trainer.per_device_train_batch_size={}"]
    slurm = {"SLURM_JOB_NODELIST": "here[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": str(os.getpid())}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", str(JOBS / "train.sbatch"), *command, size[0], size[1].format(2), "-o", str(tmp_path / "two")],
                          env={**os.environ, **slurm, "PATH": path}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 steps") == 1
    assert invoke([*command, size[0], size[1].format(4), "-o", str(tmp_path / "one"), "-q"]) == 0
    assert distance(saved(tmp_path / "one"), saved(tmp_path / "two")) < 1e-6


def test_the_pages_tables_are_what_the_script_prints() -> None:
    printed = subprocess.run([sys.executable, "benchmarks/scale.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert printed.strip() in page, "python benchmarks/scale.py --write docs/scale.md"


def test_the_pages_links_lead_somewhere() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
