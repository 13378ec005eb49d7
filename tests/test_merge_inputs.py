"""What a merge opens: hub ids, offline too; inputs that come twice; a base that is not the one an adapter was trained on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AdapterFactory
from safetensors.torch import load_file, save_file
from variantkit import edit_config

from paft.checkpoint import SINGLE
from paft.cli import invoke
from paft.errors import MismatchError, NotFoundError
from paft.merge.inputs import open_inputs
from paft.provenance import content_hash, write_manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def adapter(tiny_base: Path, make_adapter: AdapterFactory) -> Path:
    return make_adapter(tiny_base, 1)


def record(adapter: Path, base: Path) -> None:
    write_manifest(adapter, command="train-sft", recipe={}, seed=0, base={"name": "b", "content_sha256": content_hash(base)})


def test_an_input_that_comes_twice_is_refused(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    with pytest.raises(MismatchError, match="adapter is given twice"):
        open_inputs([str(adapter), str(adapter)], None)
    with pytest.raises(MismatchError, match="copy and adapter hold the same tensors") as caught:
        open_inputs([str(adapter), str(copy)], None)
    assert "sum of the weights" in (caught.value.hint or "")
    edit_config(copy, lora_alpha=1)
    assert len(open_inputs([str(adapter), str(copy)], None).deltas) == 2  # the same factors at another scale
    tuned = shutil.copytree(tiny_base, tmp_path / "tuned")
    save_file({name: tensor + 0.1 for name, tensor in load_file(tuned / SINGLE).items()}, tuned / SINGLE)
    with pytest.raises(MismatchError, match="tuned is given twice"):
        open_inputs([str(tuned), str(tuned)], str(tiny_base))


def test_a_base_of_other_content_is_refused_unless_allowed(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    assert open_inputs([str(adapter)], None).base_hash is None  # nothing is recorded, so nothing is hashed
    record(adapter, tiny_base)
    assert open_inputs([str(adapter)], None).base_hash == content_hash(tiny_base)
    narrow = shutil.copytree(tiny_base, tmp_path / "narrow")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(narrow / SINGLE).items()}, narrow / SINGLE)
    with pytest.raises(MismatchError, match=r"adapter was trained on a base of content .* narrow has") as caught:
        open_inputs([str(adapter)], str(narrow))
    assert "--allow-base-mismatch" in (caught.value.hint or "")
    assert open_inputs([str(adapter)], str(narrow), allow_base_mismatch=True).base.path == narrow


@pytest.mark.parametrize("command", [["merge"], ["merge", "--export-mergekit", "FILE"], ["delta"]])
def test_the_commands_can_allow_it(tiny_base: Path, adapter: Path, tmp_path: Path, command: list[str],
                                   capsys: pytest.CaptureFixture[str]) -> None:
    record(adapter, tiny_base)
    other = shutil.copytree(tiny_base, tmp_path / "other")
    save_file({name: tensor + 1e-3 for name, tensor in load_file(other / SINGLE).items()}, other / SINGLE)
    words = [str(tmp_path / "merge.yml") if word == "FILE" else word for word in command]
    arguments = [words[0], str(adapter), "--base", str(other), *words[1:], "-o", str(tmp_path / "out")]
    assert invoke(arguments) == 3
    assert "--allow-base-mismatch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "merge.yml").exists()
    assert invoke([*arguments, "--allow-base-mismatch"]) == 0


def test_the_layout_of_the_base_s_files_is_not_its_content(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    record(adapter, tiny_base)
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(open_inputs([str(adapter)], str(tmp_path / "sharded")).base.files) > 1


def test_a_manifest_without_a_base_says_nothing(adapter: Path) -> None:
    for base in (None, {}, {"name": "b"}, "b"):
        (adapter / "paft.json").write_text(json.dumps({"schema": 1, "base": base}))
        assert open_inputs([str(adapter)], None).base_hash is None


def cache(path: Path, repo: str, cache_dir: Path, branch: str = "main") -> None:
    """Lay a directory into the hub's cache as huggingface_hub does."""
    root = cache_dir / f"models--{repo.replace('/', '--')}"
    shutil.copytree(path, root / "snapshots" / COMMIT)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(COMMIT)


def test_hub_ids_offline(tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    edit_config(adapter, base_model_name_or_path="org/base", revision="v2")
    cache(tiny_base, "org/base", tmp_path, "v2")
    cache(adapter, "org/adapter", tmp_path)
    for name in ("org/adapter", "org/adapter@main", f"org/adapter@{COMMIT}"):
        opened = open_inputs([name], None)
        assert opened.names == [f"org/adapter@{COMMIT}"]  # what is recorded names the commit, not the machine's path
        assert opened.base_name == f"org/base@{COMMIT}"
    assert torch.is_tensor(opened.deltas[0].tensor("model.layers.0.mlp.up_proj.weight").tile(0, 1))
    with pytest.raises(NotFoundError, match=r"org/adapter@v9.*HF_HUB_OFFLINE is set"):
        open_inputs(["org/adapter@v9"], None)
    edit_config(tmp_path / "models--org--adapter" / "snapshots" / COMMIT, revision="v3")
    with pytest.raises(NotFoundError, match=r"the base that the adapters name, org/base@v3"):
        open_inputs(["org/adapter"], None)


def test_plain_adapters_are_opened_without_transformers(tiny_tied_base: Path, make_adapter: AdapterFactory) -> None:
    """Importing it takes longer than many a merge; only tied or renamed tensors need its tables."""
    adapter = make_adapter(tiny_tied_base, 1, use_dora=True, target_modules=["q_proj"])
    code = f"import sys; from paft.merge.inputs import open_inputs; open_inputs([{str(adapter)!r}], None)"
    code += "; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
