"""Merged deltas as an adapter: exact where the method is linear in the deltas, refused where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from paft.adapter import concatenate, save_adapter
from paft.delta import LoraDelta
from paft.errors import MismatchError, UsageError
from paft.merge.inputs import Inputs
from paft.merge.ops import Plan


def write_lora(inputs: Inputs, out: Path, plan: Callable[[str], Plan], progress: Callable[[str], None]) -> dict[str, Any]:
    """Write ``D = Σ c_i ΔW_i`` as one LoRA of rank Σr, with the coefficients of each tensor from its plan.

    Raises UsageError when the method is not linear in the deltas, or when an input is not a LoRA.
    """
    deltas = [delta for delta in inputs.deltas if isinstance(delta, LoraDelta)]
    if len(deltas) != len(inputs.deltas):
        raise UsageError("an adapter can only be made from adapters", hint="use --output-kind full")
    weights: dict[str, list[float]] = {}
    for name in inputs.touched():
        coefficients = plan(name).coefficients
        if coefficients is None:
            raise UsageError("this method's result is not of low rank", hint="use --output-kind full")
        for delta in deltas:
            delta.check_low_rank(name)
        modules = {delta.modules[name] for delta in deltas if name in delta.modules}
        if len(modules) > 1:
            raise MismatchError(f"the adapters call {name} by different names: {', '.join(sorted(modules))}")
        weights[modules.pop()] = list(coefficients)
        progress(name)
    config, tensors = concatenate([delta.adapter for delta in deltas], weights)
    save_adapter(out, config, tensors)
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"rank": config["r"], "bytes": {"read": written, "written": written}}
