"""The table of merge methods that the laws are tested on: one row for each method, and for each dialect that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from paft.delta import ProductTensor
from paft.merge import methods
from paft.merge.ops import DIALECTS, DenseTensor, apply

# What a method needs to change nothing on its own, by the names users write.
PLAIN: dict[str, dict[str, Any]] = {"nearswap": {"t": 1e9}, "ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 0.0}}
# Parameters that make a method do its work on the adapters of conftest, whose entries are of size 0.1.
BUSY: dict[str, dict[str, Any]] = {
    **{name: {"density": 0.4} for name in ("ties", "magnitude_prune", "dare_linear", "dare_ties", "della_linear", "della")},
    **{name: {"density": 0.4, "gamma": 0.1} for name in ("breadcrumbs", "breadcrumbs_ties")},
    **{name: {"epsilon": 0.02} for name in ("ram", "ramplus_tl")},
    "sce": {"select_topk": 0.4},
    "nearswap": {"t": 0.02},
}

EXACTLY_TWO = {"slerp", "nuslerp"}
AT_LEAST_TWO = {*EXACTLY_TWO, "model_stock"}
UNWEIGHTED = {"model_stock", "sce", "ram", "ramplus_tl"}
MEANS = {"linear", "slerp", "nuslerp", "multislerp", "karcher"}  # refuse weights that sum to zero
RANDOM = {"dare_linear", "dare_ties", "della_linear", "della"}
LINEAR = {"linear", "task_arithmetic", "slerp", "nuslerp", "multislerp", "karcher", "model_stock"}

ONLY_RATIOS = "only the ratio of the weights counts"
NO_WEIGHTS = "takes no weights"
ABSOLUTE = "the threshold is absolute"
VOTE = "an undecided vote elects +, so the positive halves stay"
UNWEIGHTED_VOTE = "every adapter votes alike in this dialect, whatever its weight"
CONTROL = "a mean of one is the same, but the count in the divisor grows"


@dataclass(frozen=True)
class Case:
    """A method with parameters as the function takes them, and the laws it is excused from, each with the reason."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.parameters.items())]).replace(" ", "")

    def run(self, deltas: Sequence[torch.Tensor], weights: Sequence[float] | None = None, **more: Any) -> torch.Tensor:
        weights = [1.0] * len(deltas) if weights is None else weights
        return apply(methods.load(self.name), deltas, weights, **{**self.parameters, **more})

    def merge(self, tensors: Sequence[Any], weights: Sequence[float] | None = None, **more: Any) -> torch.Tensor:
        """As ``run``, on deltas with their own keys."""
        weights = [1.0] * len(tensors) if weights is None else weights
        plan = methods.load(self.name)(tensors, weights, **{**self.parameters, **more})
        return plan([tensor.tile(0, tensor.rows) for tensor in tensors], 0)

    @property
    def dialect(self) -> dict[str, str]:
        return {"dialect": self.parameters["dialect"]} if "dialect" in self.parameters else {}


def _voting(name: str, **parameters: Any) -> list[Case]:
    """A method with TIES's vote, in each dialect."""
    cases = []
    for dialect in DIALECTS:
        excused = {"cancel": VOTE}
        if dialect != "mergekit":
            excused |= {"silent": UNWEIGHTED_VOTE}
        cases.append(Case(name, {**parameters, "dialect": dialect}, excused))
    return cases


CASES = [
    Case("linear", {}, {"cancel": ONLY_RATIOS}),
    Case("task_arithmetic", {"lambda_": 0.7}),
    Case("slerp", {}, {"cancel": ONLY_RATIOS}),
    Case("slerp", {"t": 0.3}, {"cancel": ONLY_RATIOS, "silent": "t stands for the weights"}),
    Case("nuslerp", {}, {"cancel": ONLY_RATIOS}),
    Case("nuslerp", {"nuslerp_flatten": False}, {"cancel": ONLY_RATIOS, "low rank": "an angle for each row"}),
    Case(
        "nuslerp",
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        {"cancel": ONLY_RATIOS, "low rank": "an angle for each column"},
    ),
    Case("multislerp", {}, {"cancel": ONLY_RATIOS}),
    Case("karcher", {}, {"cancel": ONLY_RATIOS}),
    Case("model_stock", {}, {"cancel": NO_WEIGHTS, "silent": NO_WEIGHTS}),
    Case(
        "model_stock",
        {"filter_wise": True},
        {"cancel": NO_WEIGHTS, "silent": NO_WEIGHTS, "low rank": "a factor for each row"},
    ),
    *_voting("ties", density=0.4),
    *_voting("ties", density=[0.2, 0.9], normalize=False),
    *_voting("ties", density=0.5, rescale=True, scope="global"),
    Case("sce", {}, {"cancel": NO_WEIGHTS, "silent": NO_WEIGHTS}),
    Case("sce", {"select_topk": 0.6}, {"cancel": NO_WEIGHTS, "silent": NO_WEIGHTS}),
    *(Case("dare_linear", {"density": 0.4, "dialect": dialect}) for dialect in DIALECTS),
    *_voting("dare_ties", density=0.4),
    *(Case("della_linear", {"density": [0.4, 0.6], "epsilon": [0.1, 0.3], "dialect": dialect}) for dialect in DIALECTS),
    *_voting("della", density=0.5, epsilon=0.2),
    Case("breadcrumbs", {"density": [0.5, 0.8], "gamma": [0.1, 0.3]}),
    Case("breadcrumbs_ties", {"density": 0.6, "gamma": 0.2, "normalize": True}, {"cancel": VOTE}),
    Case("magnitude_prune", {"density": [0.3, 0.8]}),
    Case("ram", {"epsilon": 3e-4}, {"cancel": NO_WEIGHTS, "silent": NO_WEIGHTS, "scale": ABSOLUTE}),
    Case("ramplus_tl", {"epsilon": 3e-4}, {"cancel": NO_WEIGHTS, "silent": NO_WEIGHTS, "scale": ABSOLUTE}),
    Case("nearswap", {"t": 5e-4}, {"scale": ABSOLUTE}),
]
LAWS = {"cancel", "silent", "scale", "low rank"}


def deltas(seed: int, rows: int = 37, columns: int = 23, count: int = 2) -> list[torch.Tensor]:
    """Random matrices in float64, each twice as large as the one before."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 1e-3 * 2**i for i in range(count)]


def loras(seed: int, rows: int, columns: int, ranks: Sequence[int] = (2, 3)) -> list[ProductTensor]:
    """Random products in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = [(torch.randn(rows, r, generator=generator), torch.randn(r, columns, generator=generator) * 1e-3) for r in ranks]
    return [ProductTensor(left.double(), right.double(), 64, f"lora {i}") for i, (left, right) in enumerate(draw)]


def dense(tensor: Any, key: str = "") -> DenseTensor:
    return DenseTensor(tensor.tile(0, tensor.rows), key or tensor.key)


sizes = st.integers(1, 9)
seeds = st.integers(0, 999)
