"""numba's compiler as the kernels use it: no interpreter lock, kept on disk, IEEE arithmetic in the order written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

jit: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy")
# For sums that go into the report and never into a weight: they may be reordered into vector lanes.
jit_lanes: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})
CHUNK = 1024  # columns at a time: the scratch rows stay in the first-level cache
