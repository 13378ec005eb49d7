"""Every bad input gives one error line with its exit code and at most one hint, and writes nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory
from datakit import write_jsonl

from paft.cli import invoke


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def spoil_columns(world: World) -> list[str]:
    write_jsonl(world.chat, [{"question": "a", "answer": "b"}])
    return world.train()


def spoil_value(world: World) -> list[str]:
    from safetensors.torch import load_file, save_file

    file = world.one / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[3]][0, 0] = float("nan")
    save_file(tensors, file)
    return world.merge()


def spoil_base(world: World) -> list[str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(other).save_pretrained(world.folder / "other")
    return world.merge("--base", str(world.folder / "other"))


def spoil_target(world: World) -> list[str]:
    world.out.mkdir()
    (world.out / "mine").write_text("keep me")
    return world.train()


def spoil_recipe(world: World) -> list[str]:
    (world.folder / "mine.yaml").write_text("kind: train-sft\nl_1: 0.1\n")
    return world.train("-c", str(world.folder / "mine.yaml"))


def spoil_encoding(world: World) -> list[str]:
    (world.folder / "mine.yaml").write_bytes(b"kind: train-sft\nname: caf\xe9\n")
    return world.train("-c", str(world.folder / "mine.yaml"))


def spoil_json(world: World) -> list[str]:
    world.chat.write_text('{"text": "a"}\n{"text": \n')
    return world.train()


def spoil_weights(world: World) -> list[str]:
    file = world.one / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return world.merge()


BAD: list[tuple[Callable[[World], list[str]], int, str]] = [
    (spoil_columns, 2, "['answer', 'question']"),
    (spoil_recipe, 2, "mine.yaml:2: unknown key 'l_1'"),
    (spoil_encoding, 2, "mine.yaml is no recipe: byte 25 is not UTF-8"),
    (spoil_json, 2, "chat.jsonl:2: not JSON"),
    (lambda w: ["merge", str(w.one), str(w.two), "-o", str(w.folder / ("x" * 300))], 2, "file name too long"),
    (lambda w: ["train-sft", "-m", str(w.base), "-d", str(w.chat), "-o", str(w.folder / ("x" * 300))], 2, "file name too long"),
    (lambda w: w.train("--set", "l_1=1"), 2, "unknown key 'l_1'"),
    (lambda w: w.train("--set", "trainer.max_step=1"), 2, "trainer.max_step"),
    (lambda w: w.train("--l1", "-1"), 2, "--l1"),
    (lambda w: w.train("--l1-solver", "proximal"), 2, "there is none"),
    (lambda w: w.train("--l1-warmup", "5"), 2, "there is none"),
    (lambda w: w.train("--l1", "1e-3", "--l1-target-sparsity", "0.9"), 2, "l1_target_sparsity looks for it"),
    (lambda w: w.train("--l1-target-sparsity", "1"), 2, "--l1-target-sparsity"),
    (lambda w: w.train("--l1", "1", "--l1-solver", "proximal", "--set", "trainer.optim=adafactor"), 2, "adafactor"),
    (lambda w: w.train("--l2", "1"), 2, "--l2"),
    (lambda w: w.train("-c", "dpo"), 2, "'train-dpo'"),
    (lambda w: ["train-sft", "-d", str(w.chat), "-o", str(w.out)], 2, "no model given"),
    (lambda w: ["train-sft", "-m", str(w.base), "-o", str(w.out)], 2, "no data given"),
    (lambda w: ["train-dpo", "-m", str(w.base), "-d", str(w.chat), "-o", str(w.out)], 2, "pref"),
    (lambda w: w.merge("--method", "tise"), 2, "'tise'"),
    (lambda w: w.merge("-p", "densty=0.5"), 2, "'densty'"),
    (lambda w: w.merge("-p", "density"), 2, "-p 'density' is not name=value"),
    (lambda w: w.merge("-p", "density=2"), 2, "density"),
    (lambda w: w.merge("--weights", "1,x"), 2, "--weights"),
    (lambda w: w.merge("--weights", "1,1,1"), 2, "weights"),
    (lambda w: ["merge", "-o", str(w.out)], 2, "no adapters"),
    (lambda w: ["methods", "tise"], 2, "'tise'"),
    (lambda w: ["trian-sft"], 2, "trian-sft"),
    (lambda w: ["run", "paft", "-o", str(w.out)], 2, "model, data.sft, data.pref are missing"),
    (lambda w: ["eval", str(w.one)], 2, "nothing to evaluate on"),
    (spoil_value, 3, "NaN"),
    (spoil_base, 3, ""),
    (spoil_target, 3, "is not empty"),
    (spoil_weights, 3, "adapter_model.safetensors"),
    (lambda w: w.train("--set", "lora.targets=no_proj"), 3, "no_proj"),
    (lambda w: w.train("--on", str(w.base)), 4, "adapter_config.json"),
    (lambda w: ["train-sft", "-m", str(w.one), "-d", str(w.chat), "-o", str(w.out)], 3, "is an adapter"),
    (lambda w: ["train-sft", "-m", "./no-model", "-d", str(w.chat), "-o", str(w.out)], 4, "./no-model"),
    (lambda w: ["train-sft", "-m", "no-org/no-model", "-d", str(w.chat), "-o", str(w.out)], 4, "no-org/no-model"),
    (lambda w: ["train-sft", "-m", str(w.base), "-d", "none.jsonl", "-o", str(w.out)], 4, "none.jsonl"),
    (lambda w: ["merge", "./no-adapter", "-o", str(w.out)], 4, "./no-adapter"),
    (lambda w: w.train("-c", "sft-l2"), 4, "'sft-l2'"),
    (lambda w: ["verify", str(w.folder / "none")], 4, "none"),
    (lambda w: ["verify", str(w.base)], 4, "paft.json"),
    (lambda w: ["sparsity-report", str(w.base)], 2, "needs its base"),
    (lambda w: ["sparsity-report", str(w.one), "--plot", str(w.chat / "figure.png")], 3, "chat.jsonl"),
]


@pytest.mark.parametrize(("spoil", "code", "said"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_bad_input_is_one_line_and_writes_nothing(spoil: Callable[[World], list[str]], code: int, said: str, world: World,
                                                  capsys: Capture) -> None:
    arguments = spoil(world)
    before = sorted(world.folder.rglob("*"))
    capsys.readouterr()
    assert_one_error(capsys, invoke(arguments), code, said)
    assert sorted(world.folder.rglob("*")) == before


@pytest.mark.parametrize("spoil", [spoil_columns, spoil_recipe, spoil_target, lambda w: w.merge("--method", "tise"), spoil_value])
def test_a_dry_run_refuses_the_same(spoil: Callable[[World], list[str]], world: World, capsys: Capture) -> None:
    arguments = spoil(world)
    capsys.readouterr()
    codes = invoke(arguments), invoke([*arguments, "--dry-run"])
    first, second, *_ = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert codes[0] == codes[1] and first == second


@pytest.fixture
def forbidden(tmp_path: Path) -> Iterator[Path]:
    """A directory in which this process may not write, also when root runs the tests."""
    folder = tmp_path / "forbidden"
    folder.mkdir(mode=0o555)
    if os.geteuid():
        yield folder
        return
    import paft.train.stage  # noqa: F401 - all code is read before the rights are dropped

    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path(tempfile.gettempdir()).resolve():
            break
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)


def test_no_permission_is_4(tmp_path: Path, forbidden: Path, capsys: Capture) -> None:
    from paft.provenance import output_dir

    code = invoke(["recipes", "cp", "ties", str(forbidden)])
    assert_one_error(capsys, code, 4, "permission denied")
    with pytest.raises(Exception) as caught, output_dir(forbidden / "out"):
        pass
    assert getattr(caught.value, "exit_code", 0) == 4 and "permission denied" in str(caught.value)
    assert list(forbidden.iterdir()) == []
