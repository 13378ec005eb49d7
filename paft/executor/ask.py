"""What a job asks of the node that it runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """What a job needs of the node that it runs on; ``memory`` in bytes."""

    cpus: float = 1
    gpus: float = 0
    memory: float = 0
