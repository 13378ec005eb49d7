"""`paft verify` names the tensor, the file, the stage or the base that is not what paft.json says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from clikit import Capture
from safetensors.torch import load_file, save_file

from paft.cli import invoke
from paft.provenance import content_hash, read_manifest, write_manifest
from paft.verify import verify_tree

BASE = "0" * 64


def artefact(path: Path, seed: int = 0, **about: object) -> Path:
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    save_file({name: torch.randn(3, 4, generator=generator) for name in ("one", "two")}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "templates").mkdir()
    (path / "templates" / "chat.jinja").write_text("x")
    write_manifest(path, command="test", recipe={}, seed=0, **{"base": {"name": "b", "content_sha256": BASE}, **about})
    (path / "README.md").write_text("a card")
    return path


def link(path: Path) -> dict[str, str]:
    return {"name": path.name, "content_sha256": content_hash(path)}


def run_of(root: Path) -> Path:
    sft, dpo = artefact(root / "adapters" / "sft", 1), artefact(root / "adapters" / "dpo", 2)
    artefact(root / "merges" / "ties", 3, inputs=[link(sft), link(dpo)])
    write_manifest(root, command="run", recipe={"train": {"sft": {}, "dpo": {}}, "merge": {"ties": {}}}, seed=0,
                   base={"name": "b", "content_sha256": BASE})
    (root / "report.json").write_text("{}")
    return root


def differences(root: Path, *against: Path) -> list[str]:
    report = verify_tree(root, against)
    assert report["ok"] is not bool(report["differences"])
    return report["differences"]


def test_what_was_not_touched_is_in_order(tmp_path: Path) -> None:
    path = artefact(tmp_path / "a")
    (path / "README.md").write_text("its owner's words")
    (path / ".gitattributes").write_text("from the hub")
    assert differences(path) == []
    shutil.copytree(path, tmp_path / "elsewhere")
    assert differences(tmp_path / "elsewhere") == []
    assert verify_tree(run_of(tmp_path / "run"))["artefacts"] == 4 and differences(tmp_path / "run") == []


def test_a_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    file = artefact(tmp_path / "a") / "model.safetensors"
    tensors = load_file(file)
    save_file({"one": tensors["one"], "two": tensors["two"] + 1e-6, "three": tensors["one"].clone()}, file)
    assert differences(tmp_path / "a") == ["tensor two in model.safetensors has changed",
                                           "tensor three in model.safetensors is not in paft.json"]
    save_file({"one": tensors["one"].reshape(4, 3)}, file)
    assert differences(tmp_path / "a") == ["tensor two is missing", "tensor one in model.safetensors has changed"]


def test_a_file_is_named(tmp_path: Path) -> None:
    path = artefact(tmp_path / "a")
    (path / "config.json").write_text('{"auto_map": {}}')
    (path / "modeling.py").write_text("import os")
    (path / "templates" / "chat.jinja").unlink()
    assert differences(path) == ["templates/chat.jinja is missing", "config.json has changed", "modeling.py is not in paft.json"]


def test_a_cut_file_is_one_difference_among_others(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run")
    file = root / "adapters" / "sft" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (root / "adapters" / "dpo" / "config.json").unlink()
    first, second = differences(root)
    assert first == "adapters/dpo: config.json is missing"
    assert second.startswith("adapters/sft: ") and "not a complete safetensors file" in second


def test_a_merge_of_another_adapter_is_found(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run")
    old = content_hash(root / "adapters" / "sft")
    shutil.rmtree(root / "adapters" / "sft")
    new = content_hash(artefact(root / "adapters" / "sft", 9))
    assert differences(root) == [f"merges/ties: made from sft of content {old[:12]}, which is now {new[:12]}"]


def test_a_lost_stage_another_base_and_a_broken_manifest_are_found(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run")
    shutil.rmtree(root / "adapters" / "dpo")
    artefact(root / "adapters" / "dpo", 2, base={"name": "b", "content_sha256": "1" * 64})
    assert differences(root) == [f"adapters/dpo: made on a base of content {'1' * 12}, the run's is {'0' * 12}"]
    shutil.rmtree(root / "adapters" / "dpo")
    assert differences(root) == ["dpo is missing: the run's recipe names it"]
    (root / "adapters" / "sft" / "paft.json").write_text('{"a": 1, "a": 2}')
    assert any("not a JSON object" in line for line in differences(root))


def test_an_older_manifest_and_a_forged_one_differ_as_a_whole(tmp_path: Path) -> None:
    path = artefact(tmp_path / "a")
    manifest = read_manifest(path)
    assert manifest is not None
    del manifest["tensors"], manifest["files"]
    (path / "paft.json").write_text(json.dumps(manifest))
    assert differences(path) == []
    (path / "paft.json").write_text(json.dumps(manifest | {"content_sha256": "f" * 64}))
    assert len(differences(path)) == 1


def test_against_says_which_input_it_is_not(tmp_path: Path) -> None:
    one, two = artefact(tmp_path / "one", 1), artefact(tmp_path / "two", 2)
    merged = artefact(tmp_path / "merged", 3, inputs=[link(one)])
    assert differences(merged, one) == []
    [line] = differences(merged, two)
    assert str(two) in line and link(one)["content_sha256"][:12] in line


def test_the_command_prints_bounded_lines_and_exits_3(tmp_path: Path, capsys: Capture) -> None:
    path = artefact(tmp_path / "a")
    for number in range(50):
        (path / f"extra{number:02d}").touch()
    assert invoke(["verify", str(path)]) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 21 and out.splitlines()[-1] == "and 30 more"
    assert "is not what paft.json describes: 50 differences" in err
    assert invoke(["verify", str(path), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and len(report["differences"]) == 50


@pytest.mark.parametrize("name", ["none", "file", "empty"])
def test_nothing_to_verify_is_not_found(name: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert invoke(["verify", str(tmp_path / name)]) == 4
