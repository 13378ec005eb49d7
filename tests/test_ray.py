"""The Ray executor on a cluster of one node in this machine: the results of the local executor, and its errors."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture
from conftest import AdapterFactory
from datakit import chat_rows, pair_rows, write_jsonl

from paft.cli import invoke
from paft.errors import MismatchError, ResourceError
from paft.executor import Ask, Executor
from paft.merge import methods

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[1]
RAY = Executor("ray", quiet=True)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from ray import cloudpickle

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    here = Path.cwd()
    os.chdir(ROOT)  # workers import paft from where the driver stands
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL",
             object_store_memory=80 << 20)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not see the tests
    yield
    ray.shutdown()
    os.chdir(here)


def graph(work: Callable[[str], Any], names: dict[str, str | None], room: Path, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    RAY.graph(names, work, workers=more.pop("workers", 0), done=found.__setitem__, room=room, **more)
    return found


def files_of(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.safetensors"))}


# Jobs


def lost_once(room: Path, name: str) -> str:
    """A job whose worker is killed in its first attempt."""
    mark = room / f"{name}.mark"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{name} again"


def lost(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(name: str) -> None:
    raise MismatchError(f"{name} does not fit", hint="make it fit")


def after(room: Path, name: str) -> list[str]:
    (room / f"{name}.made").touch()
    return sorted(each.stem for each in room.glob("*.made"))


def test_a_job_starts_after_the_one_it_needs(tmp_path: Path) -> None:
    found = graph(partial(after, tmp_path), {"b": "a", "a": None, "c": "b", "d": "elsewhere"}, tmp_path, workers=1)
    order = list(found)
    assert order.index("a") < order.index("b") < order.index("c") and {"a", "b"} <= set(found["c"])


def test_a_lost_worker_is_replaced(tmp_path: Path) -> None:
    assert graph(partial(lost_once, tmp_path), {"one": None}, tmp_path) == {"one": "one again"}
    assert (tmp_path / "logs" / "one.log").read_text().count("process") == 2


def test_a_job_that_loses_every_worker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paft.executor.tasks.RETRIES", 1)
    with pytest.raises(ResourceError, match="one: its worker was lost 2 times"):
        graph(lost, {"one": None}, tmp_path)


def test_an_error_of_paft_comes_through_as_itself(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"^one does not fit$") as caught:
        graph(refuse, {"one": None, "two": "one"}, tmp_path)
    assert caught.value.hint == "make it fit" and "one does not fit" in (tmp_path / "logs" / "one.log").read_text()


@pytest.mark.parametrize(("ask", "said"), [(Ask(gpus=1), "needs 1 GPUs, and no node of the cluster has more than 0 GPUs"),
                                           (Ask(cpus=64), "needs 64 CPUs"), (Ask(memory=1e15), "1000000.0 GB of memory")])
def test_what_no_node_has_is_refused_before_anything_runs(ask: Ask, said: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=said):
        graph(partial(after, tmp_path), {"a": None, "b": "a"}, tmp_path, asks={"b": ask})
    assert not list(tmp_path.glob("*.made"))


def test_a_directory_that_a_node_cannot_write_is_refused() -> None:
    from paft.executor.cluster import check_shared

    with pytest.raises(ResourceError, match="cannot write in /proc/1/task"):
        check_shared(Path("/proc/1/task"))


# The command line


def refused(line: list[str], capsys: Capture) -> tuple[int, str]:
    capsys.readouterr()
    code = invoke(line)
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Traceback" not in said
    return code, said


def test_a_cluster_that_is_not_there(capsys: Capture, tmp_path: Path) -> None:
    line = ["run", "demo", "-o", str(tmp_path / "out"), "--executor", "ray"]
    code, said = refused([*line, "--address", "127.0.0.1:1"], capsys)
    assert code == 5 and "no Ray cluster answers at 127.0.0.1:1" in said
    assert refused([*line, "--address", "nonsense"], capsys)[0] == 2
    assert refused([*line, "--share-base"], capsys)[0] == 2
    assert refused([*line[:-2], "--address", "auto"], capsys)[0] == 2


def test_without_ray_one_line_says_what_to_install(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, said = refused(["run", "demo", "-o", str(tmp_path / "out"), "--executor", "ray"], capsys)
    assert code == 5 and "pip install 'paft[ray]'" in said


# Merges


CASES = {**{name: [] for name in methods.names()}, "ties global": ["-p", "density=0.3", "-p", "scope=global"],
         "ties paper": ["-p", "density=0.3", "--dialect", "paper"],
         "dare_ties bfloat16": ["-p", "density=0.5", "--dtype", "bfloat16"],
         "linear stochastic": ["--dtype", "bfloat16", "--rounding", "stochastic"]}


def test_a_merge_by_workers_equals_one_here(sharded: Path, make_adapter: AdapterFactory, tiny_base: Path, tmp_path: Path,
                                            capsys: Capture) -> None:
    inputs = [str(make_adapter(tiny_base, 1)), str(make_adapter(tiny_base, 2))]
    compared = 0
    for name, more in CASES.items():
        line = ["merge", *inputs, "--base", str(sharded), "--method", name.split()[0], "--no-check", "-q", "--json", *more]
        one, two = tmp_path / f"{name} here", tmp_path / f"{name} spread"
        if invoke([*line, "-o", str(one)]) != 0:  # it needs more than its defaults, or other inputs
            continue
        here = json.loads(capsys.readouterr().out)
        assert invoke([*line, "-o", str(two), "--executor", "ray"]) == 0, capsys.readouterr().err
        there = json.loads(capsys.readouterr().out)
        assert files_of(one) == files_of(two) and len(files_of(two)) >= 4, name
        assert here | {"wall_s": 0, "out": ""} == there | {"wall_s": 0, "out": ""}, name
        compared += 1
    assert compared >= 12 and not list(tmp_path.glob(".*"))


def killed_within(job: Any, out: Path, file: str) -> Any:
    """`spread._write`, whose worker is killed in the second tensor of the first file that anyone begins."""
    from paft.merge import spread, writer

    mark, real = out.parent.parent / "killed", writer._write_one
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return spread._write(job, out, file)

    def strike(entry: Any, place: Any, merged: Any) -> tuple[str, str]:
        if [*job.inputs.base.entries].index(entry.name) and list(out.parent.glob("part-*/*")):
            real(entry, place, merged)
            mark.write_text(file)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(entry, place, merged)

    writer._write_one = strike
    return spread._write(job, out, file)


def test_a_worker_killed_within_a_file_leaves_nothing_that_looks_finished(
        sharded: Path, make_adapter: AdapterFactory, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paft.merge import spread

    line = ["merge", str(make_adapter(tiny_base, 1)), str(make_adapter(tiny_base, 2)), "--base", str(sharded), "--method",
            "dare_ties", "-p", "density=0.5", "--no-check", "-q"]
    assert invoke([*line, "-o", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(spread, "_write", killed_within)
    assert invoke([*line, "-o", str(tmp_path / "out"), "--executor", "ray"]) == 0
    assert (tmp_path / "killed").read_text().endswith(".safetensors")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["killed", "out", "whole"]


def test_only_a_whole_model_is_spread(sharded: Path, make_adapter: AdapterFactory, tiny_base: Path, tmp_path: Path,
                                      capsys: Capture) -> None:
    code, said = refused(["merge", str(make_adapter(tiny_base, 1)), "--base", str(sharded), "--method", "linear", "-o",
                          str(tmp_path / "out"), "--output-kind", "delta", "--executor", "ray"], capsys)
    assert code == 2 and "only a whole model is spread" in said and not (tmp_path / "out").exists()


# Pipelines


def recipe_of(folder: Path, base: Path, **dpo: Any) -> Path:
    own = {"lora": {"r": 2, "alpha": 4}, "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}}
    sft, pref = write_jsonl(folder / "s.jsonl", chat_rows(60)), write_jsonl(folder / "p.jsonl", pair_rows(60))
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps({
        "kind": "run", "name": "tiny", "model": str(base), "data": {"sft": str(sft), "pref": str(pref)},
        "defaults": {"sft": own, "dpo": own}, "evaluate": {"split": "test", "rows": 6},
        "train": {"sft": {"objective": "sft"}, "dpo": {"objective": "dpo", **dpo}, "both": {"objective": "dpo", "on": "sft"}},
        "merge": {"ties": {"of": ["sft", "dpo"], "method": "ties", "parameters": {"density": 0.5}}}}))
    return recipe


def test_a_run_on_ray_equals_a_local_one(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = str(recipe_of(tmp_path, tiny_base))
    line = ["run", recipe, "-q", "--json", "-o"]
    assert invoke([*line, str(tmp_path / "here"), "--workers", "1"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert invoke([*line, str(tmp_path / "there"), "--executor", "ray"]) == 0, capsys.readouterr().err
    there = json.loads(capsys.readouterr().out)
    assert here["rows"] == there["rows"] and len(files_of(tmp_path / "there")) == 4
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
    assert {file.stem for file in (tmp_path / "there" / "logs").iterdir()} == {"sft", "dpo", "both", "ties", "evaluate"}
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "there").rglob("paft.json") if file.parent.name != "there"}
    assert invoke([*line, str(tmp_path / "there"), "--executor", "ray", "--resume"]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_dry_run_asks_the_cluster(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    line = ["run", str(recipe_of(tmp_path, tiny_base, resources={"cpus": 2})), "-o", str(tmp_path / "out"), "--executor", "ray",
            "--dry-run"]
    assert invoke(line) == 0
    said = capsys.readouterr().out
    assert re.search(r"on the cluster:  sft, both, evaluate: 1 CPU, [0-9.]+ MB; dpo: 2 CPUs, ", said)
    assert "on nodes like this machine, 2 side by side" in said
    assert not (tmp_path / "out").exists()
    told = refused([*line, "--set", "train.both.resources.cpus=3"], capsys)
    assert told[0] == 5 and "both needs 3 CPUs, and no node of the cluster has more than 2" in told[1]


def test_what_the_last_stage_needs_is_asked_before_the_first(tiny_base: Path, tmp_path: Path, capsys: Capture,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from paft.runjob import Run

    real = Run.ask
    monkeypatch.setattr(Run, "ask", lambda job, said=None: real(job, said) if said else Ask(cpus=5))
    with_resources = {name: {"objective": name, "resources": {"cpus": 1}} for name in ("sft", "dpo")}
    line = ["run", str(recipe_of(tmp_path, tiny_base)), "-q", "-o", str(tmp_path / "out"), "--executor", "ray",
            "--set", f"train={json.dumps(with_resources)}"]
    code, said = refused(line, capsys)
    assert code == 5 and "evaluate needs 5 CPUs" in said and not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_stage_that_fails_ends_the_run_with_its_own_line(tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = str(recipe_of(tmp_path, tiny_base, resources={"gpus": 1}))
    line = ["run", recipe, "-o", str(tmp_path / "out"), "-q", "--executor", "ray"]
    assert refused([*line, "--dry-run"], capsys)[0] == 5 and not (tmp_path / "out").exists()
    code, said = refused(line, capsys)
    assert code == 5 and "dpo needs 1 GPUs" in said
    line = ["run", recipe, "-o", str(tmp_path / "out"), "--resume", "-q", "--executor", "ray",
            "--set", "train.dpo.resources=null"]
    code, said = refused([*line, "--set", 'defaults.sft.lora.targets=["nothing"]'], capsys)
    assert code == 3 and "match no module" in said and "its linear layers are" in said
