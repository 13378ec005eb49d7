"""A short form of `make soak`'s kills and faults: kill -9 in training and merging, a full disk, a target that is forbidden."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clikit import World
from conftest import AdapterFactory

from paft.provenance import peak_memory_mb
from paft.verify import verify_tree

ROOT = Path(__file__).resolve().parents[1]
SOAK = """
import json, random, sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
import faults, kills
room = Path(sys.argv[1])
kills.preload()
world = kills.make_world(room / "world")
keep = lambda known, *names: lambda room: {name: line for name, line in known(room).items() if name in names}
kills.commands = keep(kills.commands, "train-sft", "merge")
faults.commands = keep(faults.commands, "train-sft", "merge")
found = kills.soak(world, {"train-sft": 1, "merge": 4})
done = kills.forked(["merge", str(world / "one"), str(world / "two"), "-o", str(world / "old"), "-q"])
assert done == 0, done
for name in ("limit of a file's size", "file vanishing mid-read"):
    found[name] = kills.Tally()
    faults.FAULTS[name][0](world, random.Random(0), found[name], 1)
print(json.dumps({name: [tally.kills, dict(tally.outcomes), tally.faults] for name, tally in found.items()}))
"""


def test_what_was_killed_is_finished_to_the_same_bytes_and_a_fault_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SOAK, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not [fault for _, _, faults in found.values() for fault in faults], found
    assert found["merge"][0] >= 4 and found["merge"][1].keys() == {"same"}
    assert found["limit of a file's size"][1].get("exit 5", 0) == 2


LEFT = """
import os, signal, sys
from paft.cli import main
from paft.merge import writer
writer.write_companions = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
sys.argv[0] = "paft"
main()
"""


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def test_what_a_killed_merge_left_goes_with_the_next(world: World) -> None:
    before = {path.name for path in world.folder.iterdir()}
    done = subprocess.run([sys.executable, "-c", LEFT, *world.merge()], capture_output=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in world.folder.iterdir()} == before | {".out.partial"}
    from paft.cli import invoke

    assert invoke(world.merge("--no-check")) == 0
    assert {path.name for path in world.folder.iterdir()} == before | {"out"}
    assert verify_tree(world.out)["ok"]


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from paft.parallel import run_graph
def work(name):
    Path(sys.argv[1], name).write_text(str(os.getpid()))
    time.sleep(60)
if __name__ == "__main__":
    run_graph({"a": None, "b": None}, work, workers=2, done=print)
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    files = [tmp_path / "a", tmp_path / "b"]
    for _ in range(1200):
        if all(file.is_file() and file.read_text() for file in files):
            break
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    left = [int(file.read_text()) for file in files]
    for _ in range(600):
        left = [pid for pid in left if alive(pid)]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(left)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_peak_memory_is_this_process_own() -> None:
    ballast = bytearray(600_000_000)  # the parent's, which a child's ru_maxrss would begin with
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = "from paft.provenance import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert float(done.stdout) < 300 < 600 < peak_memory_mb()
    del ballast
