"""The unified loss on two processes."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from safetensors.torch import load_file
from trainkit import distance, factors, identical
from uftkit import in_a_process, trained


def test_two_processes_train_as_one(tiny_base: Path, tmp_path: Path) -> None:
    """Also when they go on within the second epoch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(in_a_process, (str(tiny_base), str(tmp_path), port), nprocs=2)  # type: ignore[attr-defined]
    one = factors(trained(tiny_base, tmp_path / "one", per_device_train_batch_size=4))
    whole, resumed = ([load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)] for name in ("whole", "resumed"))
    assert identical(*whole) and identical(*resumed)
    assert distance(whole[0], resumed[0]) < 1e-6
    assert distance(whole[0], one) < 1e-5
