"""A Ray cluster as paft meets it: reached, fit for what is asked, and every node able to write where the others read."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from paft.errors import PaftError, ResourceError, UsageError, first_line
from paft.executor.ask import Ask
from paft.progress import say
from paft.provenance import versions
from paft.store import Bucket, Store

PATIENCE = 60.0  # seconds that a node has to answer
_HELLO = 5.0  # seconds that an address has to take a connection
# Where the hub's files are: what is said here holds on every node. Tokens stay where they are.
_PASSED = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_CHECKED: set[tuple[str, Path | Bucket]] = set()
Probe = Path | tuple[Bucket, str]  # a file that a node writes and this machine sees


def connect(address: str | None, *, quiet: bool = False) -> None:
    """Join the cluster at ``address`` (``auto``: the one that runs on this machine; ``local``: one for this command alone).

    None joins the one that runs here, or starts one. Raises ResourceError without Ray, or where no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ResourceError("--executor ray needs Ray", hint="pip install 'paft[ray]'") from error
    if address and "://" in address:
        raise UsageError(f"--address {address}: paft runs on a node of the cluster",
                         hint="start it there, or by `ray job submit`")
    if address and address not in ("auto", "local"):
        _check_listens(address)
    if ray.is_initialized():
        return
    address = _alive(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _init(address)
    count, total = len(_nodes()), ray.cluster_resources()
    say(f"ray: {count} node{'s' * (count > 1)}, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs", quiet=quiet)


def _init(address: str | None) -> None:
    import logging

    import ray
    from ray import exceptions

    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL,
                              "runtime_env": {"env_vars": passed} if passed else None}
    try:
        if address != "local":
            try:
                ray.init(address=address or "auto", **common)
                return
            except ConnectionError:
                if address is not None:
                    raise
        ray.init(address="local", include_dashboard=False, **common)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, exceptions.RayError) as error:
        said = f"no Ray cluster answers at {address}" if address else "Ray does not start"
        why = "" if isinstance(error, ConnectionError) else f": {first_line(error)}"
        raise ResourceError(said + why, hint="`ray start --head` starts one; one with a token wants RAY_AUTH_MODE=token and "
                            "RAY_AUTH_TOKEN_PATH=FILE") from error


def _alive(address: str | None) -> str | None:
    """``address``, or where none is said and the last cluster of this machine has ended, for which Ray would wait for ever, the
    one that runs here, or ``local``. ResourceError where ``auto`` or RAY_ADDRESS finds none.
    """
    if address not in (None, "auto"):
        return address
    if said := os.environ.get("RAY_ADDRESS"):
        if said.rpartition(":")[2].isdigit() and "://" not in said:
            _check_listens(said)
        return address
    try:
        from ray._private import services

        noted, running = services.find_bootstrap_address(None), services.find_gcs_addresses()
    except (ImportError, AttributeError, OSError):  # Ray's own, which may change
        return address
    if not noted or not noted.rpartition(":")[2].isdigit() or _listens(noted):
        return address
    running = [one for one in running if _listens(one)]
    if len(running) == 1:
        return running[0]
    if address:
        raise ResourceError(f"no Ray cluster answers at {noted}, where the last one of this machine was",
                            hint="`ray start --head` starts one")
    return "local"


def _listens(address: str) -> bool:
    try:
        _check_listens(address)
    except PaftError:
        return False
    return True


def _check_listens(address: str) -> None:
    """Ray waits a minute for a machine that is not there; a socket knows at once."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--address {address!r} is not host:port", hint="for example --address auto, or 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=_HELLO).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"no Ray cluster answers at {address}: {first_line(error)}",
                            hint="ray status on its head node; the port is 6379 unless said otherwise") from error


def _nodes() -> list[dict[str, Any]]:
    """The nodes that are alive and take work."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))]


def smallest(resource: str) -> dict[str, float] | None:
    """What the node has that has the least of ``resource``, but some; None where none has any."""
    found = [node["Resources"] for node in _nodes() if node["Resources"].get(resource)]
    return min(found, key=lambda node: node[resource], default=None)


def check_fits(name: str, ask: Ask) -> None:
    """ResourceError where no node of the cluster could ever run the job: Ray would wait for one for ever."""
    wanted = _wanted(ask)
    nodes = [node["Resources"] for node in _nodes()]
    if any(all(node.get(key, 0) >= count for key, count in wanted.items()) for node in nodes):
        return
    for key, count in wanted.items():
        if (most := max((node.get(key, 0) for node in nodes), default=0)) < count:
            said = [f"{size / 1e9:.1f} GB of memory" if key == "memory" else f"{size:g} {key}s" for size in (count, most)]
            raise ResourceError(f"{name} needs {said[0]}, and no node of the cluster has more than {said[1]}",
                                hint="add a node, or say less under `resources:` of the stage")
    raise ResourceError(f"no node of the cluster has all that {name} needs: {ask.gpus:g} GPUs, {ask.cpus:g} CPUs, "
                        f"{ask.memory / 1e9:.1f} GB of memory", hint="add a node, or say less under `resources:` of the stage")


def room_for(ask: Ask) -> int:
    """How many jobs that ask for so much fit into the whole cluster at once."""
    wanted = {key: count for key, count in _wanted(ask).items() if count}
    return sum(int(min(node["Resources"].get(key, 0) // count for key, count in wanted.items())) for node in _nodes() if wanted)


def _wanted(ask: Ask) -> dict[str, float]:
    return {"GPU": ask.gpus, "CPU": ask.cpus, "memory": ask.memory}


def check_shared(room: Path | Store) -> None:
    """ResourceError for a node that cannot write in ``room``, writes another directory, or has other versions of packages."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    seen = room.bucket if isinstance(room, Store) else Path(os.path.realpath(room))
    here = versions()
    remote, asked = ray.remote(_probe), {}
    for node in _nodes():
        key = (node["NodeID"], seen)
        if key not in _CHECKED:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f".probe-{uuid.uuid4().hex}"
            file = seen / name if isinstance(seen, Path) else (seen, name)
            asked[remote.options(num_cpus=0, max_retries=1, scheduling_strategy=place).remote(file)] = (node, file)
            _CHECKED.add(key)
    try:
        for reference, (node, file) in asked.items():
            _judge(reference, node["NodeManagerAddress"], file, here)
    except BaseException:
        _CHECKED.clear()
        raise
    finally:
        for _, file in asked.values():
            with suppress(PaftError):
                file.unlink(missing_ok=True) if isinstance(file, Path) else file[0].remove(file[1])


def _judge(reference: Any, node: str, file: Probe, here: Mapping[str, str]) -> None:
    import ray
    from ray import exceptions

    there: Any = None
    try:
        there = ray.get(reference, timeout=PATIENCE)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, PaftError):
            raise error.cause from None
        raise ResourceError(f"node {node} cannot run paft: {first_line(error.cause)}",
                            hint="install paft there, by the same constraints.txt") from error
    except exceptions.RayError as error:
        raise ResourceError(f"node {node} does not answer: {type(error).__name__}", hint="ray status") from error
    for _ in range(20):  # a network disk may show a new file a little later
        if file.exists() if isinstance(file, Path) else file[0].has(file[1]):
            break
        time.sleep(0.1)
    else:
        where = file.parent if isinstance(file, Path) else file[0].url
        raise ResourceError(f"what node {node} writes in {where} is not seen here", hint="choose -o DIR on a shared disk")
    for name, version in here.items():
        if there.get(name) != version:
            raise ResourceError(f"node {node} has {name} {there.get(name, 'not at all')}, and this machine {version}",
                                hint="install the same constraints.txt on every node")


def _probe(file: Probe) -> dict[str, str]:
    """On a node: write a file, say what is installed."""
    if not isinstance(file, Path):
        file[0].write(file[1], b"")
        return versions()
    try:
        file.touch()
    except OSError as error:
        raise ResourceError(f"node {socket.gethostname()} cannot write in {file.parent}: {str(error.strerror).lower()}",
                            hint="choose -o DIR on a disk that every node shares, or a URL") from error
    return versions()
