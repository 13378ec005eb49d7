"""The first methods against their formulas in float64, and every method's interface to users."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from paft.cli import invoke
from paft.errors import UsageError
from paft.merge import methods
from paft.merge.drop import Drop, drop
from paft.merge.ops import DIALECTS, DenseTensor, apply

# (method, parameters). The newer ones are compared with mergekit's code and the papers in test_method_parity.py.
TABLE: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {"lambda_": 0.7}),
    ("slerp", {}),
    ("slerp", {"t": 0.3}),
    ("magnitude_prune", {"density": [0.3, 0.8]}),
    *(("ties", {"density": 0.4, "dialect": dialect}) for dialect in DIALECTS),
    *(("ties", {"density": [0.2, 0.9], "normalize": False, "dialect": dialect}) for dialect in DIALECTS),
    *(("dare_linear", {"density": 0.4, "dialect": dialect}) for dialect in DIALECTS),
    *(("dare_ties", {"density": 0.4, "dialect": dialect}) for dialect in DIALECTS),
]
IDS = [f"{name}-{'-'.join(map(str, parameters.values()))}" for name, parameters in TABLE]
each_row = pytest.mark.parametrize(("name", "parameters"), TABLE, ids=IDS)


def pair(seed: int = 0, shape: tuple[int, ...] = (37, 23)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for scale in (1e-3, 2e-3)]


def run(name: str, deltas: list[torch.Tensor], weights: list[float], **parameters: Any) -> torch.Tensor:
    return apply(methods.load(name), deltas, weights, **parameters)


# The formulas, written once more over whole tensors


def top(x: torch.Tensor, density: float, extra: int) -> torch.Tensor:
    count = min(x.numel(), max(1, int(density * x.numel())) + extra)
    return torch.where(x.abs() >= x.abs().flatten().sort(descending=True).values[count - 1], x, 0)


def vote(xs: list[torch.Tensor], weights: list[float], dialect: str, mean: bool) -> torch.Tensor:
    x, w = torch.stack(xs), torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    weighted = dialect == "mergekit"
    sign = ((w * x if weighted else x).sum(0) >= 0).double() * 2 - 1
    agree = ((w * x if weighted else x).sign() == sign).double()
    count = (agree * (w if weighted else 1)).sum(0)
    merged = (w * x * agree).sum(0)
    return merged / torch.where(count == 0, 1, count) if mean else merged


def dropped(x: torch.Tensor, place: int, density: float, dialect: str) -> torch.Tensor:
    rule = drop(DenseTensor(x, str(place)), density, 0, False, DIALECTS[dialect])
    assert isinstance(rule, Drop)
    kept = x * rule.mask(x, 0)
    return kept * (x.abs().sum() / kept.abs().sum()) if dialect == "mergekit" else kept / density


def formula(name: str, xs: list[torch.Tensor], w: list[float], p: dict[str, Any]) -> torch.Tensor:
    dialect, density = p.get("dialect", "mergekit"), p.get("density", 1.0)
    each = density if isinstance(density, list) else [density] * 2
    if name == "linear":
        return (w[0] * xs[0] + w[1] * xs[1]) / sum(w)
    if name == "task_arithmetic":
        return p["lambda_"] * (w[0] * xs[0] + w[1] * xs[1])
    if name == "slerp":
        t = p.get("t", w[1] / sum(w))
        a, b = (x.flatten() / x.norm() for x in xs)
        angle = torch.arccos(a @ b)
        return (torch.sin((1 - t) * angle) * xs[0] + torch.sin(t * angle) * xs[1]) / torch.sin(angle)
    if name.startswith("dare"):
        xs = [dropped(x, i, d, dialect) for i, (x, d) in enumerate(zip(xs, each, strict=True))]
    else:
        xs = [top(x, d, dialect == "paper") for x, d in zip(xs, each, strict=True)]
    if not name.endswith("ties"):
        return w[0] * xs[0] + w[1] * xs[1]
    return vote(xs, w, dialect, p.get("normalize", name == "ties" or dialect != "mergekit"))


@each_row
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7]])
def test_formula_in_float64(name: str, parameters: dict[str, Any], weights: list[float]) -> None:
    weights = [1.0, 1.0] if "t" in parameters else weights
    got = run(name, pair(), weights, **parameters)
    want = formula(name, pair(), weights, parameters)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-18)


def test_slerp_keeps_the_length_that_lerp_loses() -> None:
    a = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    assert float(run("slerp", [a, b], [1.0, 1.0]).norm()) == pytest.approx(3.0)
    assert torch.equal(run("slerp", [a, b], [1.0, 1.0], t=0.0), a)
    assert torch.equal(run("slerp", [a, b], [1.0, 1.0], t=1.0), b)
    assert torch.equal(run("slerp", [a, a], [1.0, 1.0], t=0.3), 0.7 * a + 0.3 * a)


def test_slerp_with_a_zero_delta_is_linear() -> None:
    delta = pair()[0]
    assert torch.equal(run("slerp", [delta, torch.zeros_like(delta)], [1.0, 1.0]), 0.5 * delta)


def test_opposite_deltas_and_the_tie_rule() -> None:
    """Exact opposites: mergekit and PEFT elect +, the paper's code the majority sign of the tensor."""
    a = torch.tensor([[1.0, -2.0, -3.0]])
    b = torch.tensor([[-1.0, -2.0, -3.0]])
    assert run("ties", [a, b], [1.0, 1.0]).tolist() == [[1.0, -2.0, -3.0]]
    assert run("ties", [a, b], [1.0, 1.0], dialect="peft").tolist() == [[1.0, -2.0, -3.0]]
    assert run("ties", [a, b], [1.0, 1.0], dialect="paper").tolist() == [[-1.0, -2.0, -3.0]]


# Refusals and the interface


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_negative_weight_with_normalize_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="negative weight"):
        run(name, pair(), [1.0, -1.0], normalize=True)
    assert run(name, pair(), [1.0, -1.0], normalize=False).any()


@pytest.mark.parametrize(
    ("parameters", "weights", "message"),
    [
        ({"t": 1.5}, [1.0, 1.0], "in \\[0, 1\\]"),
        ({"t": math.nan}, [1.0, 1.0], "in \\[0, 1\\]"),
        ({"t": 0.5}, [1.0, 2.0], "not both"),
        ({"space": "weight"}, [1.0, 1.0], "base"),
    ],
)
def test_slerp_refuses(parameters: dict[str, Any], weights: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run("slerp", pair(), weights, **parameters)
    with pytest.raises(UsageError, match="two adapters"):
        run("slerp", pair()[:1], [1.0])


@pytest.mark.parametrize(
    ("name", "parameters", "weights", "message"),
    [
        ("della", {"density": 0.9}, [1, 1, 1], "density ± epsilon"),
        ("della_linear", {"density": 0.5, "epsilon": [0.1, 0.6, 0.1]}, [1, 1, 1], "density ± epsilon"),
        ("della_linear", {"density": 0.5, "epsilon": -0.1}, [1, 1, 1], "density ± epsilon"),
        ("della", {"density": 0.5, "epsilon": [0.1, 0.1]}, [1, 1, 1], "2 values for 3"),
        ("breadcrumbs", {"gamma": 1.0}, [1, 1, 1], "gamma must be"),
        ("breadcrumbs_ties", {"gamma": [0.1]}, [1, 1, 1], "1 values for 3"),
        ("breadcrumbs_ties", {"normalize": True}, [1, -1, 1], "negative weight"),
        ("model_stock", {}, [1, 1, 2], "no weights"),
        ("sce", {}, [0.5, 0.5, 0.5], "no weights"),
        ("sce", {"select_topk": 0.0}, [1, 1, 1], "select_topk"),
        ("ram", {}, [1, 2, 1], "no weights"),
        ("ram", {"epsilon": -1.0}, [1, 1, 1], "epsilon"),
        ("ramplus_tl", {"r": math.nan}, [1, 1, 1], "negative"),
        ("karcher", {}, [1, -1, 1], "negative weight"),
        ("karcher", {"tol": -1.0}, [1, 1, 1], "tol"),
        ("nearswap", {}, [1, 1, 1], "needs t"),
        ("nearswap", {"t": 0.0}, [1, 1, 1], "positive"),
        ("nuslerp", {}, [1, 1, 1], "two adapters"),
    ],
)
def test_values_that_are_refused(name: str, parameters: dict[str, Any], weights: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(name, [*pair(), pair(1)[0]], weights, **parameters)


def test_refusals_that_depend_on_the_number_of_adapters() -> None:
    with pytest.raises(UsageError, match="at least two"):
        run("model_stock", pair()[:1], [1.0])
    with pytest.raises(UsageError, match="needs two"):
        run("sce", pair()[:1], [1.0], select_topk=0.5)
    with pytest.raises(UsageError, match="no effect"):
        run("nuslerp", pair(), [1.0, 1.0], nuslerp_row_wise=True)


@pytest.mark.parametrize(
    ("name", "given_", "hint"),
    [
        ("tise", {}, "ties"),
        ("ties", {"densty": 0.5}, "density"),
        ("ties", {"lamda": 0.5}, "lambda"),
        ("ties", {"lambda_": 0.5}, "lambda"),
        ("ties", {"seed": 1}, "known"),
        ("ties", {"normalize": 1}, "paft methods ties"),
        ("ties", {"density": "half"}, "paft methods ties"),
        ("ties", {"density": True}, "paft methods ties"),
        ("slerp", {"space": "log"}, "paft methods slerp"),
    ],
)
def test_wrong_names_and_types_are_refused(name: str, given_: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        methods.resolve(name, given_)
    assert hint in (caught.value.hint or "")


def test_a_dialect_where_there_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="every dialect"):
        methods.resolve("linear", {}, "paper")


def test_resolve_fills_in_defaults_and_bind_hands_in_what_is_asked_for() -> None:
    resolved = methods.resolve("dare_linear", {"density": 0.5, "lambda": 2})
    assert resolved == {"density": 0.5, "normalize": False, "rescale": True, "lambda": 2}
    tensors = [DenseTensor(delta) for delta in pair()]
    plans = [methods.bind("dare_linear", resolved, seed=seed, dialect="paper", base=None) for seed in (0, 1)]
    filters = [plan(tensors, [1.0, 1.0]).filters[0] for plan in plans]
    assert filters[0] != filters[1]


@pytest.mark.parametrize("name", methods.names())
def test_describe_says_what_a_user_needs(name: str) -> None:
    told = methods.describe(name)
    assert told["name"] == name
    assert told["summary"].endswith(".")
    assert "Source:" in told["doc"]
    assert not set(methods.HANDED_IN) & set(told["parameters"])
    assert all(not key.endswith("_") for key in told["parameters"])


def test_the_list_of_methods_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: lines.index("")]] == methods.names()
    assert all(len(line) < 80 for line in lines)


@pytest.mark.parametrize("name", methods.names())
def test_the_help_of_a_method_fits_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["methods", name]) == 0
    told = capsys.readouterr().out
    assert all(len(line) < 80 for line in told.splitlines()), [line for line in told.splitlines() if len(line) > 79]
    assert "".join(told.split()).startswith("".join(methods.describe(name)["doc"].split()))  # no word is lost


def test_names_load_nothing_heavy() -> None:
    code = "import sys; from paft.merge import methods; methods.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
