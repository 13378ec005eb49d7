"""A training on several processes: they find each other, FSDP2 on GPUs or a CPU, and the layouts that are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from paft.errors import MismatchError
from paft.models import device, sharded

T = TypeVar("T")


def join(options: dict[str, Any]) -> None:
    """Find the other processes of a launched training, and the device of this one; ``options`` are the recipe's ``trainer``.

    `Trainer` does the same, but after the model is loaded: every process would load it onto the first GPU, and with FSDP's
    ``cpu_ram_efficient_loading`` transformers would not see that only the first process has to read it.
    """
    if "LOCAL_RANK" in os.environ:
        from accelerate.state import PartialState

        cpu = options.get("use_cpu", device() == "cpu")
        PartialState(cpu=cpu, backend=options.get("ddp_backend"), timeout=timedelta(seconds=options.get("ddp_timeout", 1800)))


def said_by_the_first(find: Callable[[], T]) -> T:
    """``find()`` of the first process, in all of them: hashes of a large base are not to be computed by each."""
    from torch import distributed

    if not distributed.is_initialized():
        return find()
    found = [find() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def shard_on_cpu(args: Any) -> None:
    """Have accelerate shard over processes on a CPU too; call it before an `Accelerator` is built from ``args``.

    accelerate asks for FSDP where it finds several GPUs only, and passes it over in silence on a CPU: DDP, with another memory
    than was asked for. The rest of it and of `Trainer` works there as it is, over gloo.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if (sharded() or args.fsdp_plugin_args) and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # the branch of AcceleratorState that reads the plugin


def check_layout(state: Any) -> None:
    """MismatchError under FSDP1 and ZeRO-3, for an accelerate ``state``; DDP, FSDP2 and ZeRO-1/2 pass.

    FSDP1 keeps flat shards outside forward, in which the factors of a layer cannot be found; ZeRO-3 keeps empty tensors there,
    and has no place for a gradient that does not come from its own forward. So neither can be penalised, measured or saved.
    """
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise MismatchError("paft cannot see LoRA factors under FSDP1: they are flat shards outside forward",
                            hint="set fsdp_version: 2 in the accelerate config, or use DDP")
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise MismatchError("paft cannot see LoRA factors under ZeRO-3: they are empty outside forward",
                            hint="use ZeRO-2, FSDP2 or DDP")
