"""numba's compiler as the kernels use it: no interpreter lock, kept on disk, IEEE arithmetic in the order written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

CHUNK = 1024  # columns at a time: the scratch rows stay in the first-level cache


def jit(function: Callable[..., Any]) -> Any:
    """Compile on first use."""
    return _compiled(function)


def jit_lanes(function: Callable[..., Any]) -> Any:
    """As `jit`, for sums that may be reordered into vector lanes: they go into the report and never into a weight."""
    return _compiled(function, fastmath={"reassoc", "nsz"})


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no directory to keep it in can be written to: compiled anew by each process
        return numba.njit(function, **options)
