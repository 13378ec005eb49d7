"""`paft train-joint` from the command line: what the plan says, and one line for a mistake with nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory
from datakit import write_jsonl
from trainkit import pref_rows, sft_rows

from paft.cli import invoke


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    found = World(tiny_base, make_adapter, tmp_path)
    write_jsonl(found.pairs, pref_rows(24))
    write_jsonl(found.chat, sft_rows(24))
    return found


def command(world: World, *more: str) -> list[str]:
    return ["train-joint", "-m", str(world.base), "--sft-data", str(world.chat), "--pref-data", str(world.pairs),
            "-o", str(world.out), "--set", "trainer.max_steps=2", *more]


def test_the_plan_says_that_optima_are_estimated_first(world: World, capsys: Capture) -> None:
    for flag, said in ((["--estimate-optima"], True), (["--sft-opt", "1", "--dpo-opt", "0.1"], False)):
        assert invoke(command(world, "--method", "maxright", *flag, "--dry-run")) == 0
        out = capsys.readouterr().out
        assert ("trained alone first" in out) == said
        assert all(len(line) <= 80 or str(world.folder) in line for line in out.splitlines())


@pytest.mark.parametrize(("method", "flag", "value"), [
    ("alright", "--order", "sft-dpo"), ("mix", "--max-eval-steps", "3"), ("sequential", "--smoothing", "0.5"),
    ("maxright", "--uft-loss", "bce")])
def test_a_flag_of_another_method_is_refused(method: str, flag: str, value: str, world: World, capsys: Capture) -> None:
    assert_one_error(capsys, invoke(command(world, "--method", method, flag, value)), 2, f"{flag} is of --method")
    assert not world.out.exists()


def test_such_a_key_of_a_file_waits_for_its_method(world: World) -> None:
    recipe = world.folder / "both.yaml"
    recipe.write_text("kind: train-joint\nmethod: maxright\nmax_eval_steps: 7\nsft_opt: 1.0\ndpo_opt: 0.1\n")
    assert invoke(command(world, "-c", str(recipe), "--method", "alright")) == 0


@pytest.mark.parametrize(("more", "code", "said"), [
    (["--stop-front", "nowhere", "--eval-fraction", "0.3"], 4, "no log.jsonl in nowhere"),
    (["--stop-front", "."], 2, "stop_front needs evaluation data"), (["--max-tokens", "900"], 2, "one budget")])
def test_refused_by_the_plan_too(more: list[str], code: int, said: str, world: World, capsys: Capture) -> None:
    for dry in ([], ["--dry-run"]):
        assert_one_error(capsys, invoke(command(world, *more, *dry)), code, said)
    assert not list(world.folder.glob("out*"))
