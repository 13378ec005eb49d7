"""An object on the driver's machine that jobs call from theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paft.errors import PaftError, ResourceError


class _Seat:
    """The object in a process of its own, on the node of the driver; it ends with the driver."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.thing = make()

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self.thing, method)(*arguments)


@dataclass(frozen=True)
class Desk:
    """``desk("method", *arguments)`` calls it there, one call at a time, from wherever the desk was carried to."""

    seat: Any

    @classmethod
    def open(cls, make: Callable[[], Any]) -> Desk:
        """A desk for what ``make()`` returns, on this machine; the cluster is joined."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(_Seat).options(num_cpus=0, scheduling_strategy=here).remote(make))

    def __call__(self, method: str, *arguments: Any) -> Any:
        import ray
        from ray import exceptions

        try:
            return ray.get(self.seat.call.remote(method, arguments))
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, PaftError | OSError):
                raise error.cause from None
            raise
        except exceptions.RayError as error:
            raise ResourceError(f"the driver's machine does not answer: {type(error).__name__}", hint="ray status") from error
