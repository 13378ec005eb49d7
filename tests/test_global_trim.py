"""Trimming over a whole model: one threshold, exact, ties in order of names and indices; TIES as its authors run it."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from paft.adapter import read_adapter
from paft.delta import Tiled
from paft.errors import UsageError
from paft.merge import methods
from paft.merge.engine import merge
from paft.merge.global_trim import global_trims, model_trims
from paft.merge.ops import DIALECTS, DenseTensor

Model = dict[str, torch.Tensor]


def filtered(model: Model, density: float, dialect: str = "mergekit", gamma: float = 0.0, step: int = 3) -> torch.Tensor:
    """The model, trimmed as one and flattened in the order of its tensors."""
    tensors = {name: DenseTensor(data, name, step) for name, data in model.items()}
    found = global_trims(lambda: tensors.items(), density, DIALECTS[dialect], gamma)
    assert list(found) == list(model)
    return torch.cat([found[name](data, 0).flatten() for name, data in model.items()])


def flat(model: Model) -> torch.Tensor:
    return torch.cat([data.flatten() for data in model.values()])


def draw(seed: int, shapes: Iterable[tuple[int, int]], levels: bool = False) -> Model:
    generator = torch.Generator().manual_seed(seed)
    shapes = list(shapes)
    if levels:
        return {str(i): torch.randint(-2, 3, shape, generator=generator).float() for i, shape in enumerate(shapes)}
    return {str(i): torch.randn(shape, generator=generator) * 10.0 ** -(i % 3) for i, shape in enumerate(shapes)}


shapes = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(0, 999), shapes, st.floats(0.01, 1.0), st.floats(0.0, 0.9), st.integers(1, 8), st.booleans(), st.booleans())
def test_one_stable_sort_over_the_model(
    seed: int, sizes: list[tuple[int, int]], density: float, gamma: float, step: int, levels: bool, wide: bool
) -> None:
    model = draw(seed, sizes, levels)
    model = {name: data.double() for name, data in model.items()} if wide else model
    values = flat(model)
    order = values.abs().sort(descending=True, stable=True).indices
    count = len(values) if density == 1 else max(1, int(density * len(values)))
    skipped = 0 if density == 1 else min(int(gamma * len(values)), len(values) - count)
    want = torch.zeros_like(values)
    want[order[skipped : skipped + count]] = values[order[skipped : skipped + count]]
    assert torch.equal(filtered(model, density, gamma=gamma, step=step), want)


def original_trim(values: torch.Tensor, share: float) -> torch.Tensor:
    """As the authors' code does it: the (d - int(d·K))-th smallest of d magnitudes is the threshold, and is kept."""
    threshold = values.abs().kthvalue(len(values) - int(len(values) * share)).values
    return torch.where(values.abs() >= threshold, values, 0)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 999), shapes, st.floats(0.05, 0.95), st.booleans())
def test_paper_is_the_authors_trim(seed: int, sizes: list[tuple[int, int]], density: float, levels: bool) -> None:
    model = draw(seed, sizes, levels)
    assert torch.equal(filtered(model, density, "paper"), original_trim(flat(model), density))


def test_no_delta_is_ever_dense() -> None:
    """A model of many tensors passes through tile by tile, none of them kept, in two passes."""
    made: list[weakref.ref[DenseTensor]] = []
    most = reads = 0

    class Watched(DenseTensor):
        def tile(self, start: int, stop: int) -> torch.Tensor:
            nonlocal reads
            reads += 1
            assert stop - start <= 8
            return super().tile(start, stop)

    def tensors() -> Iterable[tuple[str, Tiled]]:
        nonlocal most
        for place in range(20):
            one = Watched(torch.randn(64, 16, generator=torch.Generator().manual_seed(place)), "", 8)
            made.append(weakref.ref(one))
            most = max(most, sum(each() is not None for each in made))
            yield str(place), one

    global_trims(tensors, 0.3, DIALECTS["mergekit"])
    assert most == 2  # the last one and the next one
    assert reads == 2 * 20 * 8  # a third pass only where magnitudes tie


# Through the engine


@pytest.fixture
def pair(tiny_base: Path, make_adapter: AdapterFactory) -> list[Path]:
    """Two adapters of unequal reach, the second with one loud layer, which global trimming prefers."""
    some = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "alpha_pattern": {"mlp.up_proj": 80}}
    return [make_adapter(tiny_base, 1), make_adapter(tiny_base, 2, **some)]


def run(inputs: list[Path], out: Path, method: str, **options: Any) -> dict[str, Any]:
    options = {"base": None, "parameters": {}, "weights": None, **options}
    return merge([str(path) for path in inputs], method=method, out=out, **options)


def products(adapter: Path) -> Model:
    """ΔW by tensor in float32, in the order of the names."""
    factors = sorted(read_adapter(adapter).factors.items())
    return {f"{module}.weight": (f.B * f.scale) @ f.A for module, f in factors}


def kept(report: dict[str, Any]) -> list[int]:
    return [adapter["kept"] for adapter in report["adapters"]]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"scope": "global"}),
        ("magnitude_prune", {"scope": "global"}),
        ("breadcrumbs", {"scope": "global", "gamma": 0.1}),
        ("breadcrumbs_ties", {"scope": "global", "gamma": [0.0, 0.2]}),
    ],
)
def test_the_engine_trims_over_the_model(pair: list[Path], tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    parameters = {"density": [0.2, 0.4], **parameters}
    sizes = [len(flat(products(path))) for path in pair]
    report = run(pair, tmp_path / "out", method, parameters=parameters)
    assert kept(report) == [int(0.2 * sizes[0]), int(0.4 * sizes[1])]
    by_tensor = run(pair, tmp_path / "tensor", method, parameters={**parameters, "scope": "tensor"})
    shares = zip((0.2, 0.4), pair, strict=True)
    assert kept(by_tensor) == [sum(int(share * delta.numel()) for delta in products(path).values()) for share, path in shares]
    assert report["merged_norm"] != by_tensor["merged_norm"]


def test_ties_of_the_paper_is_the_authors_code(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    """Global trim, sum of signs, mean over those that agree: `ties_merging` with topk, mass and dis-mean, λ = 0.7."""
    parameters = {"density": 0.3, "lambda": 0.7}
    run(pair, tmp_path / "out", "ties", dialect="paper", parameters=parameters)
    models = [products(path) for path in pair]
    trimmed = [dict(zip(m, original_trim(flat(m), 0.3).split([d.numel() for d in m.values()]), strict=True)) for m in models]
    base, got = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in base:
        zero = torch.zeros(base[name].numel())
        x = torch.stack([each.get(name, zero) for each in trimmed])
        agree = (x.sign() == x.sum(0).sign()) & (x != 0)
        want = 0.7 * (x * agree).sum(0) / agree.sum(0).clamp(min=1)
        assert torch.allclose(got[name].flatten() - base[name].flatten(), want, rtol=0, atol=1e-6), name


def test_bytes_do_not_depend_on_tiles(pair: list[Path], tmp_path: Path) -> None:
    outs = []
    for elements in (1 << 18, 1, 100):
        run(pair, tmp_path / str(elements), "ties", dialect="paper", parameters={"density": 0.3}, tile_elements=elements)
        outs.append(hashlib.sha256((tmp_path / str(elements) / "model.safetensors").read_bytes()).hexdigest())
    assert len(set(outs)) == 1


def test_who_trims_over_the_model() -> None:
    """The paper's TIES does unless told otherwise; a method without a scope never does."""

    def asked(name: str, dialect: str, **given_: Any) -> bool:
        return model_trims([], [methods.resolve(name, {"density": 0.5, **given_}, dialect)], dialect, 100) is not None

    assert asked("ties", "paper") and asked("ties", "mergekit", scope="global")
    assert asked("magnitude_prune", "mergekit", scope="global")
    assert not asked("ties", "mergekit") and not asked("ties", "peft") and not asked("ties", "paper", scope="tensor")
    assert not asked("dare_ties", "paper") and not asked("breadcrumbs", "mergekit")
    with pytest.raises(UsageError, match="scope"):
        methods.resolve("ties", {"scope": "model"})


@pytest.mark.parametrize("other", [{"density": 0.4}, {"scope": "tensor"}, {"gamma": 0.3}])
def test_one_threshold_cannot_serve_two_densities(other: dict[str, Any]) -> None:
    first = {"density": 0.5, "gamma": 0.1, "scope": "global"}
    assert model_trims([], [first, first], "mergekit", 100) == {}
    with pytest.raises(UsageError, match="must not vary"):
        model_trims([], [first, {**first, **other}], "mergekit", 100)
    assert model_trims([], [{**first, "scope": "tensor"}, {"density": 0.4, "scope": "tensor"}], "mergekit", 100) is None


def test_filters_are_handed_to_the_method() -> None:
    tensors = [DenseTensor(torch.randn(4, 5, generator=torch.Generator().manual_seed(i))) for i in (0, 1)]
    trims = list(global_trims(lambda: [("", tensors[0])], 0.1, DIALECTS["mergekit"]).values()) * 2
    for name in ("ties", "magnitude_prune", "breadcrumbs", "breadcrumbs_ties"):
        resolved = methods.resolve(name, {"density": 0.5, "scope": "global"})
        plan = methods.bind(name, resolved, dialect="mergekit", trims=trims)(tensors, [1.0, 1.0])
        assert list(plan.filters) == trims
