"""Reference log-probabilities computed once by several processes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch
from preferencekit import columns, columns_of_a_process


def test_each_of_two_processes_has_all_that_one_has(tiny_base: Path, tmp_path: Path) -> None:
    """TRL's own pass writes a file of its own name in each process, and then looks for the first one's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(columns_of_a_process, (str(tiny_base), str(tmp_path), port), nprocs=2)  # type: ignore[attr-defined]
    alone = columns(str(tiny_base), str(tmp_path))
    assert {len(values) for values in alone.values()} == {8, 16}
    assert all(json.loads((tmp_path / f"{rank}.json").read_text()) == alone for rank in (0, 1))
