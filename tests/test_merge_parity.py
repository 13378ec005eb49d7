"""Against the other implementations: mergekit's `merge_tensors`, PEFT's `merge_utils` and `merge_and_unload`.

Random continuous data in float64, where nobody's rounding or tie order shows. DARE's masks are random everywhere, so
ours are fed to the others through `torch.bernoulli`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from methodkit import AT_LEAST_TWO, PLAIN
from safetensors.torch import load_file

from paft.merge import methods
from paft.merge.drop import Drop, drop
from paft.merge.engine import merge
from paft.merge.ops import DIALECTS, DenseTensor, apply

SHAPE = (19, 31)
WEIGHTS = [[1.0, 1.0], [0.3, 0.7], [2.0, 0.5]]


@pytest.fixture
def deltas() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def our_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Make `torch.bernoulli` return our masks, adapter after adapter, as both libraries draw them."""

    def install(density: float) -> None:
        def masks() -> Iterator[torch.Tensor]:
            for place in "01":
                rule = drop(DenseTensor(torch.ones(SHAPE), place), density, 0, False, DIALECTS["peft"])
                assert isinstance(rule, Drop)
                yield rule.mask(torch.ones(SHAPE), 0)

        drawn = masks()
        monkeypatch.setattr(torch, "bernoulli", lambda like: next(drawn).to(like.dtype))

    return install


def ours(name: str, deltas: list[torch.Tensor], weights: list[float], **parameters: Any) -> torch.Tensor:
    return apply(methods.load(name), deltas, weights, **parameters)


def mergekit(name: str, deltas: list[torch.Tensor], weights: list[float], **parameters: Any) -> torch.Tensor:
    from mergekit.merge_methods import merge_tensors

    zero = torch.zeros(SHAPE, dtype=torch.float64)
    given = {"weight": weights, **parameters}
    return merge_tensors([zero, *deltas], name, parameters=given, base_index=0, dtype=torch.float64)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize(("name", "density"), [("task_arithmetic", None), ("ties", 1.0), ("ties", 0.2), ("ties", 0.01)])
def test_mergekit(
    deltas: list[torch.Tensor],
    weights: list[float],
    normalize: bool,
    strength: float,
    name: str,
    density: float | None,
) -> None:
    theirs = mergekit(name, deltas, weights, normalize=normalize, density=[density or 1.0] * 2, **{"lambda": strength})
    keywords = {} if density is None else {"density": density}
    got = ours(name, deltas, weights, normalize=normalize, lambda_=strength, **keywords)
    assert torch.allclose(got, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [-0.5, -0.5]])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear"])
def test_mergekit_with_negative_weights(deltas: list[torch.Tensor], weights: list[float], name: str) -> None:
    got = ours(name, deltas, weights, normalize=False)
    assert torch.allclose(got, mergekit(name, deltas, weights, normalize=False), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mergekit_linear(deltas: list[torch.Tensor], weights: list[float]) -> None:
    from mergekit.merge_methods import merge_tensors

    theirs = merge_tensors(deltas, "linear", parameters={"weight": weights}, dtype=torch.float64)
    assert torch.allclose(ours("linear", deltas, weights), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mergekit_nuslerp_is_slerp_in_delta_space(deltas: list[torch.Tensor], weights: list[float]) -> None:
    theirs = mergekit("nuslerp", deltas, weights)
    assert torch.allclose(ours("slerp", deltas, weights), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_mergekit_slerp_is_weight_space(deltas: list[torch.Tensor], size: float) -> None:
    """With small deltas mergekit interpolates linearly, with large ones along the arc; so do we."""
    from mergekit.merge_methods import merge_tensors

    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    deltas = [delta * size for delta in deltas]
    models = [base + delta for delta in deltas]
    theirs = merge_tensors(models, "slerp", parameters={"t": 0.3}, base_index=0, dtype=torch.float64)
    got = base + ours("slerp", deltas, [1.0, 1.0], t=0.3, space="weight", base=DenseTensor(base))
    assert torch.allclose(got, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_mergekit_dare(
    deltas: list[torch.Tensor],
    our_masks: Callable[[float], None],
    weights: list[float],
    rescale: bool,
    name: str,
) -> None:
    our_masks(0.3)
    theirs = mergekit(name, deltas, weights, density=[0.3] * 2, rescale=rescale)
    # mergekit masks and rescales in float32 on the CPU, whatever the input's type.
    got = ours(name, deltas, weights, density=0.3, rescale=rescale)
    assert torch.allclose(got, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_peft(deltas: list[torch.Tensor], our_masks: Callable[[float], None], weights: list[float], name: str) -> None:
    from peft.utils import merge_utils

    our_masks(0.3)
    theirs = getattr(merge_utils, name)(deltas, torch.tensor(weights, dtype=torch.float64), density=0.3)
    keywords = {"dialect": "peft"} if methods.describe(name)["dialects"] else {}
    got = ours(name, deltas, weights, density=0.3, **keywords)
    assert torch.allclose(got, theirs, rtol=1e-12, atol=1e-14)


def test_dialects_agree_where_they_should_and_differ_where_they_must(deltas: list[torch.Tensor]) -> None:
    """Equal weights: mergekit's and PEFT's TIES are one formula. Unequal ones move the vote in mergekit's only."""
    by = {d: ours("ties", deltas, [1.0, 1.0], density=0.3, dialect=d) for d in DIALECTS}
    assert torch.allclose(by["mergekit"], by["peft"], rtol=1e-12)
    assert 0 < int((by["paper"] != by["peft"]).sum()) <= 4  # one more entry kept of each delta
    uneven = {d: ours("ties", deltas, [0.3, 0.7], density=0.3, dialect=d) for d in DIALECTS}
    assert float((uneven["mergekit"] != uneven["peft"]).double().mean()) > 0.2


IDENTITY: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.down_proj": 5}},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


def fold(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return model.merge_and_unload().state_dict()


ALONE = [name for name in methods.names() if name not in AT_LEAST_TWO]


@pytest.mark.parametrize(
    ("name", "variant"), [*((name, "plain") for name in ALONE), *(("task_arithmetic", variant) for variant in list(IDENTITY)[1:])]
)
def test_identity_is_merge_and_unload(
    tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, variant: str, name: str
) -> None:
    adapter = make_adapter(tiny_base, 1, **IDENTITY[variant])
    merge([str(adapter)], base=None, method=name, parameters=PLAIN.get(name, {}), weights=None, out=tmp_path / "out")
    want = fold(tiny_base, adapter)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for tensor in want:
        assert torch.allclose(got[tensor], want[tensor], rtol=0, atol=1e-6), tensor


def test_identity_of_slerp_at_its_ends(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> None:
    paths = [make_adapter(tiny_base, seed) for seed in (1, 2)]
    for t, path in enumerate(paths):
        out = tmp_path / str(t)
        merge([str(p) for p in paths], base=None, method="slerp", parameters={"t": t}, weights=None, out=out)
        want = fold(tiny_base, path)
        got = load_file(out / "model.safetensors")
        assert all(torch.allclose(got[tensor], want[tensor], rtol=0, atol=1e-6) for tensor in want)
