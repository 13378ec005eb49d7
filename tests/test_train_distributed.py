"""Two processes give what one gives: DDP and FSDP2 on the CPU, with gloo; FSDP1 and ZeRO-3 are refused."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distkit
import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from test_train_penalised import sft_trainer
from trainkit import distance

from paft.errors import MismatchError
from paft.train.distributed import check_layout


@pytest.fixture(scope="module")
def two(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of two processes that share the work."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(distkit.run, (str(tiny_base), str(out), port), nprocs=distkit.WORLD)  # type: ignore[attr-defined]
    return torch.load(out / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def one(tiny_base: Path) -> Any:
    """The model of a single process that has seen all rows, with its gradients."""
    core = distkit.adapted(str(tiny_base))
    distkit.loss_of(core, core, distkit.TOKENS, 1e-3).backward()
    return core


def test_the_penaltys_gradient_is_that_of_one_process(two: Any, one: Any) -> None:
    alone = distkit.gradients(one)
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    assert distance(two["ddp"], alone) < 1e-6 * largest
    assert distance(two["fsdp2"]["gradients"], alone) < 1e-6 * largest


def test_the_proximal_step_on_shards_is_that_of_one_process(two: Any, one: Any) -> None:
    alone = distkit.step(one, 1e-2)
    assert distance(two["fsdp2"]["stepped"], alone) < 1e-7
    assert any((tensor == 0).any() for tensor in alone.values())
    saved = distkit.saved(one)
    assert two["fsdp2"]["saved"].keys() == saved.keys() and len(saved) == len(alone)
    assert distance(two["fsdp2"]["saved"], saved) < 1e-7


def test_a_run_on_two_processes_is_the_run_on_one(two: Any, tiny_base: Path, tmp_path: Path) -> None:
    """The real trainer: 2 x 4 rows a step against 8; and the log of the first process speaks for both."""
    alone = distkit.trained(str(tiny_base), tmp_path, batch=8)
    assert distance(two["trainer"]["factors"], alone["factors"]) < 1e-6
    for record, other in zip(two["trainer"]["log"], alone["log"], strict=True):
        keys = {"loss", "task_loss", "l1", "l1_lambda", "l1_relative", "share_below_1e-5"} & other.keys()
        assert [record[key] for key in sorted(keys)] == pytest.approx([other[key] for key in sorted(keys)], rel=1e-4)
        assert {"l1", "l1_lambda"} <= keys


def test_layouts_that_hide_the_factors_are_refused_with_the_reason() -> None:
    for state, reason in (
        (SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1)), "FSDP1.*flat shards"),
        (SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3)), "ZeRO-3.*empty"),
    ):
        with pytest.raises(MismatchError, match=reason) as caught:
            check_layout(state)
        assert caught.value.hint
    for fine in (
        SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), deepspeed_plugin=None),
        SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2)), SimpleNamespace(),
    ):
        check_layout(fine)


def test_a_trainer_is_refused_when_it_is_built(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU accelerate makes no plugin of FSDP1's, so it is put where `Trainer` would have put it."""
    trainer = sft_trainer(tiny_base, tmp_path)
    assert trainer.is_fsdp_enabled is False and hasattr(type(trainer.accelerator.state), "deepspeed_plugin")
    monkeypatch.setitem(vars(trainer.accelerator.state), "fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=1))
    with pytest.raises(MismatchError, match="FSDP1"):
        trainer.create_accelerator_and_postprocess()
