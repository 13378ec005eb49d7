"""Which layouts of a distributed run let the penalty see whole factors."""

from __future__ import annotations

from typing import Any

from paft.errors import MismatchError


def check_layout(state: Any) -> None:
    """MismatchError under FSDP1 and ZeRO-3, for an accelerate ``state``; DDP, FSDP2 and ZeRO-1/2 pass.

    FSDP1 keeps flat shards outside forward, in which the factors of a layer cannot be found; ZeRO-3 keeps empty tensors there,
    and has no place for a gradient that does not come from its own forward.
    """
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise MismatchError("the penalty cannot see LoRA factors under FSDP1: they are flat shards outside forward",
                            hint="set fsdp_version: 2 in the accelerate config, or use DDP")
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise MismatchError("the penalty cannot see LoRA factors under ZeRO-3: they are empty outside forward",
                            hint="use ZeRO-2, FSDP2 or DDP")
