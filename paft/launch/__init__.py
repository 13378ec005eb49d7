"""`--devices N`: a training's command line in N processes on this machine, started by torch's elastic launcher (torchrun's).

The first process says everything: its output is the command's. What the others say is kept, and shown only if one of them
fails alone. Beside this file lie the configs for `accelerate launch`, which does the same on several machines: ``ddp.yaml`` and
``fsdp2.yaml``; `--fsdp` takes its settings from the second.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from paft.errors import NotFoundError, ResourceError, UsageError, did_you_mean

PARENT = "PAFT_PARENT"  # in the processes: who started them


def config(name: str) -> Path:
    """The accelerate config ``ddp`` or ``fsdp2``."""
    known = {file.stem: file for file in Path(__file__).parent.glob("*.yaml")}
    if name not in known:
        raise NotFoundError(f"no accelerate config {name!r}", hint=did_you_mean(name, known))
    return known[name]


def environment(name: str) -> dict[str, str]:
    """What `accelerate launch` tells a process of the FSDP of a config: its keys are the names of the variables."""
    said = yaml.safe_load(config(name).read_text(encoding="utf-8")).get("fsdp_config", {})
    spelt = {key.upper(): str(value).lower() if isinstance(value, bool) else str(value) for key, value in said.items()}
    return spelt | ({"ACCELERATE_USE_FSDP": "true"} if spelt else {})


def launched(devices: int | None) -> bool:
    """Is this one of the processes already? UsageError where another launcher has started another number of them."""
    if "LOCAL_RANK" not in os.environ:
        return False
    if devices and devices != int(world := os.environ["WORLD_SIZE"]):
        raise UsageError(f"--devices {devices} under a launcher that has started {world} processes", hint="leave --devices out")
    return True


def launch(arguments: Sequence[str], devices: int, *, shard: bool = False) -> int:
    """Run ``paft *arguments`` in ``devices`` processes, a GPU each, or a share of the cores each; returns the exit code.

    The code is that of the process that failed first. Ctrl-C and SIGTERM reach all of them. Raises ResourceError where there are
    fewer GPUs (without a GPU: cores), or where a process is killed from outside.
    """
    _check(devices)
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from paft.models import free_cores

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # which process it stops, and a table of exit codes
    os.environ.update({**environment("fsdp2" if shard else "ddp"), PARENT: str(os.getpid())})
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, free_cores() // devices)))
    with tempfile.TemporaryDirectory(prefix="paft-") as logs:
        kept = DefaultLogsSpecs(log_dir=logs, redirects={rank: Std.ALL for rank in range(1, devices)})
        job = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=devices, run_id="paft", rdzv_backend="c10d",
                           rdzv_endpoint="localhost:0", max_restarts=0, logs_specs=kept)
        try:
            elastic_launch(job, sys.executable)("-m", "paft", *arguments)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            return _told(rank, failure.exitcode, Path(logs))
        except SignalException as stop:
            return 128 + stop.sigval
    return 0


def _check(devices: int) -> None:
    """ResourceError for more processes than GPUs, or cores where there is no GPU."""
    import torch

    from paft.models import free_cores

    count = torch.cuda.device_count()
    if devices > (most := count or free_cores()):
        has = f"{count} GPU{'s' * (count > 1)}" if count else f"no GPU, and {most} CPU cores"
        raise ResourceError(f"--devices {devices}: this machine has {has}", hint=f"pass --devices {most} or less")


def _told(rank: int, code: int, logs: Path) -> int:
    """The exit code of the command, after what the process ``rank`` has said of it, if nobody has seen that yet."""
    if code < 0:
        name = signal.Signals(-code).name
        raise ResourceError(f"process {rank} of the training was ended by {name}, most often for lack of memory",
                            hint="a smaller batch (--set trainer.per_device_train_batch_size=1); --resume goes on")
    said = "".join(file.read_text(errors="replace") for file in logs.rglob(f"{rank}/stderr.log")).rpartition("error: ")
    if rank and said[1]:
        print(f"error: process {rank}: {said[2].strip()}", file=sys.stderr)
    return code


def follow() -> None:
    """In a process: end with the launcher, even if that is killed; an orphan would hold the lock that ``--resume`` needs."""
    parent = os.environ.get(PARENT)
    if parent:
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
