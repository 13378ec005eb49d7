"""Which cluster is joined where none is named: never one that has ended."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from paft.errors import ResourceError
from paft.executor.cluster import _alive

pytest.importorskip("ray")
from ray._private import services


def test_a_cluster_that_has_ended_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray notes the last one of a machine, and waits for it whether or not it is there."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.socket() as alive:
        alive.bind(("127.0.0.1", 0))
        alive.listen()
        here, gone = f"127.0.0.1:{alive.getsockname()[1]}", "127.0.0.1:1"
        monkeypatch.setattr(services, "find_gcs_addresses", lambda: {gone, here})
        assert [_alive(each) for each in (None, "auto", "local", gone)] == [None, "auto", "local", gone]
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(gone)
        assert [_alive(each) for each in (None, "auto", "local")] == [here, here, "local"]
        monkeypatch.setattr(services, "find_gcs_addresses", set)
        assert _alive(None) == "local"  # as where there was none
        with pytest.raises(ResourceError, match=f"no Ray cluster answers at {gone}"):
            _alive("auto")
        monkeypatch.setenv("RAY_ADDRESS", gone)
        with pytest.raises(ResourceError, match=f"no Ray cluster answers at {gone}"):
            _alive(None)
        monkeypatch.setenv("RAY_ADDRESS", here)
        assert _alive(None) is None
