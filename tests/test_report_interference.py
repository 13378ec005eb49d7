"""Two deltas against dense float64 references, chance levels that hold for unrelated ones, and advice that fits the geometry."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clikit import Capture, World
from conftest import AdapterFactory
from test_report_sparsity import Factors, Source, block_sparse, dead_rank, gaussian, huge_range, one_entry

from paft.cli import invoke
from paft.errors import MismatchError, UsageError
from paft.report import interference_tables
from paft.report.advice import advise
from paft.report.angles import angles
from paft.report.interference import Interference, interference
from paft.report.overlap import CLASSES, LANES, plain
from paft.report.sources import from_factors

NAMES = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def meet(a: list[Factors], b: list[Factors], density: float = 0.2) -> Interference:
    one, other = (from_factors(Source(name, dict(zip(NAMES, each, strict=False)))) for name, each in (("a", a), ("b", b)))
    return interference(one, other, density=density)


def dense(factors: Factors) -> np.ndarray:
    return (factors.scale * (factors.B.double() @ factors.A.double())).numpy()


def top(values: np.ndarray, density: float) -> np.ndarray:
    count = max(1, int(density * values.size))
    return (np.abs(values) >= np.sort(np.abs(values).ravel())[-count]) & (values != 0)


PAIRS = {
    "random": (gaussian(seed=1), gaussian(seed=2)),
    "of different size": (gaussian(seed=1, rms=1e-3), gaussian(seed=2, rms=1e-7)),
    "sparse and dense": (block_sparse(), gaussian(seed=2)),
    "same": (gaussian(seed=1), gaussian(seed=1)),
    "opposed": (gaussian(seed=1), replace(gaussian(seed=1), scale=-0.5)),
    "one is zero": (gaussian(seed=1), Factors(gaussian().A, torch.zeros(48, 8))),
    "huge scale range": (huge_range(), gaussian(seed=2)),
    "one entry": (one_entry(), gaussian(20, 30, 4, seed=2)),
    "ranks dead": (dead_rank(), gaussian(seed=2)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_every_number_equals_the_dense_one(name: str, density: float) -> None:
    pair = PAIRS[name]
    a, b = (dense(each) for each in pair)
    found = meet([pair[0]], [pair[1]], density).overall
    data, near = found.to_dict(), {"rel": 1e-4, "abs": 1e-9}
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    assert found.cosine == pytest.approx(float((a * b).sum()) / size if size else 0.0, **near)
    both, against = (a != 0) & (b != 0), a * b < 0
    assert data["sign_conflict"] == pytest.approx(against[both].mean() if both.any() else 0.0, **near)
    shares = [float((x[against] ** 2).sum() / (x**2).sum()) if x.any() else 0.0 for x in (a, b)]
    assert found.in_conflict == pytest.approx(sum(shares) / 2, **near)
    met = [float((x[both] ** 2).sum() / (x**2).sum()) if x.any() else 0.0 for x in (a, b)]
    assert found.in_conflict_chance == pytest.approx(sum(met) / 4, **near)
    kept_a, kept_b = top(a, density), top(b, density)
    fewer = min(kept_a.sum(), kept_b.sum())
    assert data["overlap"] == pytest.approx((kept_a & kept_b).sum() / fewer if fewer else 0.0, **near)
    for x, kept, trimmed in ((a, kept_a, found.trimmed[0]), (b, kept_b, found.trimmed[1])):
        assert trimmed == pytest.approx(float((x[~kept] ** 2).sum() / (x**2).sum()) if x.any() else 0.0, **near)
    fight = kept_a & kept_b & against
    for x, y, voted in ((a, b, found.voted_away[0]), (b, a, found.voted_away[1])):
        loses = fight & (np.abs(x) < np.abs(y))
        assert voted == pytest.approx(float((x[loses] ** 2).sum() / (x**2).sum()) if x.any() else 0.0, **near)


@pytest.mark.parametrize("name", PAIRS)
def test_what_the_factors_tell_alone_is_what_the_passes_find(name: str) -> None:
    one, other = (from_factors(Source("x", {"layers.0.q": each})) for each in PAIRS[name])
    quick, whole = interference(one, other, fast=True), interference(one, other)
    told, found = quick.overall.to_dict(), whole.overall.to_dict()
    for key in ("entries", "cosine", "cosine_chance", "frobenius", "row_spaces", "column_spaces"):
        near = pytest.approx(found[key], rel=1e-5, abs=1e-7) if isinstance(found[key], float | list) else found[key]
        assert told[key] == near
    assert math.isnan(told["overlap"]) and quick.to_dict()["worst_layers"] == []


@pytest.mark.parametrize("width", [1, 33, 700])
def test_the_compiled_pass_equals_the_plain_one(width: int) -> None:
    from paft.report.kernels import add_pair

    random = np.random.default_rng(width)
    a, b = (random.standard_normal((7, width)).astype(np.float32) for _ in range(2))
    a[2], b[:, ::5] = 0, 0
    b[4] = -a[4]  # equal magnitudes of opposite sign
    one, other = np.zeros((2, CLASSES, LANES, 4))
    for add, table in ((plain, one), (add_pair, other)):
        add(a, b, np.float32(0.5), np.float32(0.9), table)
        add(a, b, np.float32(0), np.float32(0), table)
    np.testing.assert_allclose(one.sum(axis=1), other.sum(axis=1), rtol=1e-12, atol=1e-12)


def test_what_ties_keeps_and_votes_away_is_what_it_merges() -> None:
    """The merged TIES delta of unit weights, summed, has the energy that the report does not count as lost."""
    from paft.delta import ProductTensor
    from paft.merge import methods

    pair = gaussian(seed=1), gaussian(seed=2)
    tensors = [ProductTensor(each.B * each.scale, each.A, 16, str(i)) for i, each in enumerate(pair)]
    plan = methods.load("ties")(tensors, [1.0, 1.0], density=0.3, normalize=False)
    merged = plan([tensor.tile(0, 48) for tensor in tensors], 0).double().numpy()
    a, b = (dense(each) for each in pair)
    kept_a, kept_b = top(a, 0.3), top(b, 0.3)
    alone = np.where(kept_a & ~kept_b, a, 0) + np.where(kept_b & ~kept_a, b, 0)
    met = kept_a & kept_b & (a * b > 0)
    found = meet([pair[0]], [pair[1]], 0.3).overall
    energies = (a**2).sum(), (b**2).sum()
    survived = sum(e * (1 - t - v) for e, t, v in zip(energies, found.trimmed, found.voted_away, strict=True))
    winners = float((merged**2).sum()) - float(((a + b)[met] ** 2).sum()) + float((a[met] ** 2 + b[met] ** 2).sum())
    assert float((alone**2).sum()) < survived == pytest.approx(winners, rel=1e-4)


def test_chance_is_what_unrelated_deltas_show() -> None:
    found = meet([gaussian(400, 300, seed=i) for i in range(6)], [gaussian(400, 300, seed=i) for i in range(50, 56)])
    overall, data = found.overall, found.overall.to_dict()
    assert abs(overall.cosine) < 4 * overall.cosine_chance
    assert abs(data["sign_conflict"] - 0.5) < 4 * 0.5 / math.sqrt(6 * 400 * 300)
    assert overall.in_conflict == pytest.approx(overall.in_conflict_chance, abs=0.01)
    assert data["overlap"] == pytest.approx(data["overlap_chance"], rel=0.03)
    for spaces, size in ((overall.rows, 300), (overall.columns, 400)):
        assert spaces and spaces.chance == pytest.approx(8 / size)
        assert spaces.mean_square == pytest.approx(spaces.chance, rel=0.25)


def test_the_chance_cosine_of_loras_that_share_their_inputs() -> None:
    """Unrelated B on one A: their cosines have the spread that is told, several times that of unrelated inputs."""
    one, drawn = gaussian(60, 200, 4, seed=1), [gaussian(60, 200, 4, seed=seed) for seed in range(2, 122)]
    for same, inputs in ((True, 4), (False, 200)):
        found = [meet([one], [replace(other, A=one.A) if same else other]).overall for other in drawn]
        spread = math.sqrt(sum(each.cosine**2 for each in found) / len(found))
        told = math.sqrt(sum(each.cosine_chance**2 for each in found) / len(found))
        assert spread == pytest.approx(told, rel=0.2)  # three deviations of 120 draws
        assert told == pytest.approx(1 / math.sqrt(60 * inputs), rel=0.3)


@pytest.mark.parametrize("name", ["random", "same", "sparse and dense"])
def test_principal_angles_are_scipys(name: str) -> None:
    from scipy.linalg import orth, subspace_angles

    pair = PAIRS[name]
    parts = [from_factors(Source("x", {"layers.0.q": each})).parts[0] for each in pair]
    found = angles(*parts)
    assert found
    for spaces, bases in ((found[0], [orth(dense(each).T) for each in pair]), (found[1], [orth(dense(each)) for each in pair])):
        cosines = np.cos(subspace_angles(*bases))
        assert spaces.largest == pytest.approx(cosines.max(), abs=1e-6)
        assert spaces.mean_square == pytest.approx((cosines**2).mean(), abs=1e-6)


@pytest.mark.parametrize("name, method", [
    ("random", "task_arithmetic"), ("same", "linear"), ("opposed", "ties"), ("one is zero", None),
    ("sparse and dense", "task_arithmetic"),
])  # fmt: skip
def test_the_advice_fits_the_geometry(name: str, method: str | None) -> None:
    found = meet([PAIRS[name][0]], [PAIRS[name][1]])
    advice = advise(found)
    assert advice.method == method
    assert (advice.density is not None) == (method == "ties")
    if advice.density:
        assert advice.density >= max(found.overall.d90) > advice.density - 0.06
        assert f"density={advice.density:g}" in (advice.command or "")


def test_a_difference_of_size_and_lone_tensors_are_told() -> None:
    found = meet([gaussian(seed=1, rms=1e-3)] * 3, [gaussian(seed=2, rms=1e-5)])
    told = " ".join(advise(found).warnings)
    assert "a is 1" in told and "times as large as b" in told
    assert "2 tensors are changed by a alone" in told
    assert found.alone == ((NAMES[1], NAMES[2]), ())


def test_one_seed_is_not_taken_for_one_task() -> None:
    """LoRAs that start from one A read the same inputs whatever they learn."""
    one, other = gaussian(seed=1), gaussian(seed=2)
    found = meet([one], [replace(other, A=one.A)])
    assert found.overall.rows and found.overall.rows.mean_square == pytest.approx(1)
    assert any("the same A" in warning for warning in advise(found).warnings)
    assert not advise(meet([one], [other])).warnings


def test_the_layers_that_collide_most_come_first() -> None:
    a = [gaussian(seed=i) for i in range(6)]
    b = [gaussian(seed=50 + i) if i not in (2, 3) else replace(a[i], scale=-1.0) for i in range(6)]
    found = meet(a, b)
    assert found.worst[0].label == "1" and found.worst[0].in_conflict > 0.95
    assert "1 (" in interference_tables.worst(found) and "2 (" not in interference_tables.worst(found)
    assert "No layer" in interference_tables.worst(meet(a, [gaussian(seed=60 + i) for i in range(6)]))


def test_what_cannot_meet_is_refused() -> None:
    with pytest.raises(MismatchError, match="no tensor in common"):
        interference(from_factors(Source("a", {"q": gaussian()})), from_factors(Source("b", {"v": gaussian()})))
    with pytest.raises(MismatchError, match="shape of"):
        meet([gaussian()], [gaussian(m=50)])
    for density in (0.0, 1.5):
        with pytest.raises(UsageError, match="density"):
            meet([gaussian()], [gaussian(seed=1)], density)


def test_the_command_prints_a_table_json_and_markdown(
    tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path, capsys: Capture
) -> None:
    world = World(tiny_base, make_adapter, tmp_path)
    pair = [str(world.one), str(world.two)]
    assert invoke(["interference", *pair, "--by", "module"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert f"next:paftmerge{pair[0]}{pair[1]}--method" in "".join(out.split())
    assert f"{world.one.parent.name}/adapter" in out  # both directories are called adapter
    assert invoke(["interference", *pair, str(world.two), "--density", "1", "--base", str(tiny_base), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data) == 3 and data[2]["overall"]["cosine"] == pytest.approx(1)
    assert invoke(["interference", *pair, "--markdown"]) == 0
    assert "| cosine |" in capsys.readouterr().out
    assert invoke(["interference", pair[0]]) == 2
    capsys.readouterr()
    assert invoke(["interference", *pair, "--fast", "--by", "layer"]) == 0
    out = capsys.readouterr().out
    assert "cosine" in out and "nan" not in out and "next:" not in out
    assert invoke(["interference", *pair, "--fast", "--html", "x.html"]) == 2
