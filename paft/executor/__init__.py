"""Where independent jobs run: in processes of this machine (`paft.parallel`), or as tasks of a Ray cluster (`cluster`, `tasks`).

    Executor("local").graph(needs, work, ...)      worker processes, each with its share of the cores and a GPU in turn
    Executor("ray").graph(needs, work, ...)        Ray tasks, each with what it asks for, on any node that sees the directory

Both call ``work(name)`` for every name after the one it needs, and tell ``done(name, result)`` here; a stage does not know where
it runs. What it makes lies in a directory that all of them see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft.executor.ask import Ask as Ask
from paft.parallel import Done, run_graph
from paft.store import Store

NAMES = ("local", "ray")


@dataclass(frozen=True)
class Executor:
    """``local``, or ``ray`` with the ``address`` of a cluster; None is the one that runs here, or one for this command alone."""

    name: str = "local"
    address: str | None = None
    quiet: bool = False

    @property
    def spreads(self) -> bool:
        """Do jobs run on other machines, where only shared directories are seen?"""
        return self.name != "local"

    def graph(self, needs: Mapping[str, str | None], work: Callable[[str], Any], *, workers: int, done: Done, room: Path | Store,
              asks: Mapping[str, Ask] | None = None, show: bool = True) -> None:
        """Run the jobs, at most ``workers`` at once (0: as there is room); on Ray each with its ``asks``.

        Its log is in ``room``/logs, behind a Store's URL when it ends; ``show`` draws progress and says where the logs are.
        Raises what a job raises, and ResourceError as `run_graph`, `cluster.connect` and `cluster.check_shared`.
        """
        if not self.spreads:
            run_graph(needs, work, workers=workers or 1, done=done)
            return
        from paft.executor.tasks import Logs, run_tasks

        self.join()
        run_tasks(needs, work, workers=workers, done=done, asks=asks or {}, logs=Logs(room), quiet=self.quiet or not show)

    def join(self) -> None:
        """Connect to the cluster, where there is one to connect to."""
        if self.spreads:
            from paft.executor.cluster import connect

            connect(self.address, quiet=self.quiet)

    def ask(self, size: int) -> Ask:
        """What a job over a model of ``size`` bytes asks for, where its recipe does not say.

        A GPU where the cluster has any. Else memory for the model in float32, and one core for a small model, which cannot use
        two; a whole node for a larger one.
        """
        if not self.spreads:
            return Ask()
        from paft.executor.cluster import smallest

        self.join()
        if node := smallest("GPU"):
            return Ask(cpus=min(1, node.get("CPU", 0)), gpus=1)
        cores = (smallest("CPU") or {}).get("CPU", 1)
        return Ask(cpus=min(1, cores) if size < SMALL else cores, memory=int(_IMPORTS + 2 * size))

    def check(self, asks: Mapping[str, Ask]) -> None:
        """ResourceError where no node could ever run one of these jobs; better asked before the first than before the last."""
        if self.spreads:
            from paft.executor.cluster import check_fits

            self.join()
            for name, ask in asks.items():
                check_fits(name, ask)

    def room_for(self, size: int) -> int:
        """How many jobs over a model of ``size`` bytes the cluster can run at once; at least one."""
        from paft.executor.cluster import room_for

        ask = self.ask(size)
        return max(1, room_for(ask)) if self.spreads else 1

    def whole_node(self, memory: float, *, gpu: bool = False) -> Ask:
        """All the cores of the smallest node, ``memory`` bytes and perhaps a GPU, for a job that uses what there is."""
        from paft.executor.cluster import smallest

        self.join()
        node = smallest("GPU" if gpu else "CPU") or {}
        return Ask(cpus=node.get("CPU", 1), gpus=int(gpu), memory=_IMPORTS + memory)


LOCAL = Executor()
SMALL = 100e6  # bytes of a base up to which one core is enough for a training
_IMPORTS = 4e8  # bytes that Python takes with torch and transformers
