"""Delta files: what goes in comes out, bit for bit, in the smallest form, read by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from methodkit import BUSY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paft.checkpoint import SINGLE, Checkpoint
from paft.delta import FullDelta, Tiled
from paft.errors import MismatchError
from paft.merge import deltafile, methods
from paft.merge.deltafile import INDEX, DeltaFile
from paft.merge.deltas import Source, write_delta
from paft.merge.engine import merge
from paft.merge.extract import Prune, extract
from paft.merge.ops import DenseTensor, tiles
from paft.provenance import verify


def run(inputs: list[Path], out: Path, method: str = "task_arithmetic", **options: Any) -> dict[str, Any]:
    options = {"base": None, "parameters": {}, "weights": None, **options}
    return merge([str(path) for path in inputs], method=method, out=out, **options)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def whole(tensor: Tiled) -> torch.Tensor:
    return torch.cat([tile for _, tile in tiles(tensor)])


@pytest.fixture
def pair(tiny_base: Path, make_adapter: AdapterFactory) -> list[Path]:
    return [make_adapter(tiny_base, 1), make_adapter(tiny_base, 2, r=2, target_modules=["q_proj", "up_proj"])]


def small_base(path: Path, **shapes: tuple[int, ...]) -> Checkpoint:
    """A directory with one random tensor for each shape."""
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path / SINGLE)
    return Checkpoint.open(path)


def written(base: Checkpoint, deltas: dict[str, torch.Tensor], out: Path, **options: Any) -> dict[str, Any]:
    """Dense tensors as a delta file over ``base``, read in tiles of 3 rows."""
    out.mkdir()
    source = Source(base, str(base.path), list(deltas), lambda name: DenseTensor(deltas[name], step=3), lambda name: None, [], [])
    return write_delta(source, out, **{"dtype": None, "base_hash": "0", "progress": lambda name: None, **options})


# The round trip


@pytest.mark.parametrize("method", methods.names())
def test_merging_the_delta_file_is_the_merge_byte_for_byte(pair: list[Path], tmp_path: Path, method: str) -> None:
    parameters = BUSY.get(method, {})
    run(pair, tmp_path / "direct", method, parameters=parameters)
    report = run(pair, tmp_path / "delta", method, parameters=parameters, output_kind="delta")
    run([tmp_path / "delta"], tmp_path / "again")  # the file names its base
    assert (tmp_path / "again" / SINGLE).read_bytes() == (tmp_path / "direct" / SINGLE).read_bytes()
    assert report["relative_error"] == 0.0 and not verify(tmp_path / "delta")
    size = sum(file.stat().st_size for file in (tmp_path / "delta").glob("*.safetensors"))
    assert report["bytes"]["written"] == size


def test_a_linear_merge_stays_its_factors_and_nests(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    one = run(pair, tmp_path / "one", "linear", weights=[0.3, 0.9], output_kind="delta")
    run([tmp_path / "one", pair[0]], tmp_path / "direct", weights=[0.7, -0.1])
    two = run([tmp_path / "one", pair[0]], tmp_path / "two", weights=[0.7, -0.1], output_kind="delta")
    run([tmp_path / "two"], tmp_path / "again")
    assert one["formats"] == {"low_rank": 14} == two["formats"]
    assert (tmp_path / "again" / SINGLE).read_bytes() == (tmp_path / "direct" / SINGLE).read_bytes()


def test_a_fine_tuned_model_comes_back(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    """The difference of two models has a vector that changed, tensors that did not, and goes through unchanged."""
    run(pair[:1], tmp_path / "tuned", "magnitude_prune", parameters={"density": 0.05})
    tensors = load_file(tmp_path / "tuned" / SINGLE)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "tuned" / SINGLE, metadata={"format": "pt"})
    report = extract(str(tmp_path / "tuned"), base=str(tiny_base), out=tmp_path / "delta")
    assert report["tensors"] == {"merged": 15, "unchanged": 6}
    assert report["formats"] == {"csr": 15}
    base = Checkpoint.open(tiny_base)
    found = DeltaFile(tmp_path / "delta", base)
    want = FullDelta(Checkpoint.open(tmp_path / "tuned"), base, "")
    assert found.shape("model.norm.weight") == (32,)
    for name in found.names:
        assert torch.equal(whole(found.tensor(name, 40)), whole(want.tensor(name)))
    run([tmp_path / "delta"], tmp_path / "again")
    run([tmp_path / "tuned"], tmp_path / "direct", base=str(tiny_base))
    assert (tmp_path / "again" / SINGLE).read_bytes() == (tmp_path / "direct" / SINGLE).read_bytes()


# The forms


def sparse(shape: tuple[int, ...], density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(shape, generator=generator)
    return values * (torch.rand(shape, generator=generator) < density)


@pytest.mark.parametrize(("density", "form"), [(0.02, "csr"), (0.3, "bitmask"), (1.0, "dense")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 101), (501,), (5, 7, 33)])
def test_the_smallest_form_any_rows(
    density: float, form: str, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    delta = sparse(shape, density).to(dtype).float()
    base = small_base(tmp_path / "base", w=shape)
    report = written(base, {"w": delta}, tmp_path / "out", dtype=dtype)
    assert report["formats"] == {form: 1} and report["relative_error"] == 0.0
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / deltafile.SINGLE).values())
    if form != "dense":
        values = int(delta.count_nonzero()) * dtype.itemsize
        assert size < delta.numel() * dtype.itemsize
        assert size - values < delta.numel() / 8 + 9 * (delta.numel() // shape[-1] + 1)
    tensor = DeltaFile(tmp_path / "out", base).tensor("w", 150)
    flat = delta.reshape(-1, shape[-1])
    assert torch.equal(whole(tensor), flat)
    for start in range(tensor.rows):
        assert torch.equal(tensor.tile(start, min(start + 2, tensor.rows)), flat[start : start + 2])


@pytest.mark.parametrize("columns", [1 << 16, (1 << 16) + 1])
def test_wide_rows_take_wide_columns(columns: int, tmp_path: Path) -> None:
    delta = torch.zeros(2, columns)
    delta[1, -1], delta[0, 5] = 1.0, 2.0
    base = small_base(tmp_path / "base", w=(2, columns))
    written(base, {"w": delta}, tmp_path / "out")
    assert torch.equal(whole(DeltaFile(tmp_path / "out", base).tensor("w")), delta)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_base(tmp_path / "base", w=(64, 100))
    written(base, {"w": sparse((64, 100), 0.05)}, tmp_path / "out")
    found = DeltaFile(tmp_path / "out", base)
    tensor = found.tensor("w")
    read, seen = DeltaFile.read, []
    monkeypatch.setattr(DeltaFile, "read", lambda self, array, a, b: seen.append(b - a) or read(self, array, a, b))
    counts = [int(tensor.tile(row, row + 1).count_nonzero()) for row in range(64)]
    assert seen == [count for count in counts for _ in range(2)]


def test_rounding_to_a_narrow_type_reports_its_error(tmp_path: Path) -> None:
    delta = sparse((40, 30), 1.0)
    base = small_base(tmp_path / "base", w=(40, 30))
    report = written(base, {"w": delta}, tmp_path / "out", dtype=torch.bfloat16)
    want = float((delta.bfloat16().double() - delta.double()).norm() / delta.double().norm())
    assert report["relative_error"] == pytest.approx(want, rel=1e-9) and want > 1e-4
    with pytest.raises(MismatchError, match=r"delta of w does not fit into torch\.float16"):
        written(base, {"w": delta * 1e6}, tmp_path / "narrow", dtype=torch.float16)


@pytest.mark.parametrize("prune", [Prune(largest=0.1), Prune(threshold=0.05)], ids=["largest", "threshold"])
def test_pruning_is_exact(prune: Prune, pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    extract(str(pair[0]), base=None, out=tmp_path / "all")
    report = extract(str(pair[0]), base=None, out=tmp_path / "pruned", prune=prune, tile_elements=100)
    base = Checkpoint.open(tiny_base)
    full, kept = DeltaFile(tmp_path / "all", base), DeltaFile(tmp_path / "pruned", base)
    assert full.names == kept.names
    lost, energy, left = 0.0, 0.0, 0
    for name in full.names:
        before, after = whole(full.tensor(name)), whole(kept.tensor(name))
        bound = prune.threshold or float(before.abs().flatten().kthvalue(before.numel() - int(0.1 * before.numel()) + 1)[0])
        assert torch.equal(after, before * (before.abs() >= bound))
        lost += float((before.double() - after.double()).square().sum())
        energy += float(before.double().square().sum())
        left += int(after.count_nonzero())
    assert report["relative_error"] == pytest.approx((lost / energy) ** 0.5, rel=1e-12)
    assert report["nonzero"] == left and report["kept_share"] == pytest.approx(left / report["entries"], rel=1e-6)
    assert report["bytes"]["written"] < report["bytes"]["dense"]


# The files


def test_shards_and_the_safetensors_library(tmp_path: Path) -> None:
    shapes = {f"layer.{i}": (30, 20) for i in range(5)} | {'odd "name" δ': (7,)}
    base = small_base(tmp_path / "base", **shapes)
    deltas = {name: sparse(shape, 0.5) + 0.0 for name, shape in shapes.items()}
    written(base, deltas, tmp_path / "one")
    report = written(base, deltas, tmp_path / "many", shard=3500)
    assert len(list((tmp_path / "many").glob("delta-*-of-00003.safetensors"))) == 3 and (tmp_path / "many" / INDEX).is_file()
    assert weights_of(tmp_path / "one").keys() == weights_of(tmp_path / "many").keys()
    assert report["bytes"]["written"] == sum(f.stat().st_size for f in (tmp_path / "many").glob("*.safetensors"))
    found, one = DeltaFile(tmp_path / "many", base), DeltaFile(tmp_path / "one", base)
    assert found.content_hash == one.content_hash
    assert all(torch.equal(whole(found.tensor(name)), deltas[name].reshape(-1, deltas[name].shape[-1])) for name in shapes)
    with safe_open(tmp_path / "one" / deltafile.SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("layer.0#rows")[-1] == deltas["layer.0"].count_nonzero()


def test_nothing_is_no_file(tiny_base: Path, pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="the base itself"):
        extract(str(tiny_base), base=str(tiny_base), out=tmp_path / "out")
    with pytest.raises(MismatchError, match="zero everywhere"):
        run(pair, tmp_path / "out", weights=[0.0, 0.0], output_kind="delta")
    assert not list(tmp_path.iterdir())
