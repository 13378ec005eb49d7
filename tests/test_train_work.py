"""OUT.partial: what stands there, what may go on from it, and what is told when it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clikit import assert_one_error
from test_train_resume import SFT_ROWS, Killed, assert_same, die_at, killed, recipe
from test_train_stage import write_rows
from trainkit import sft_rows

from paft.cli import invoke
from paft.errors import MismatchError, ResourceError
from paft.target import output_dir
from paft.train import stage, work
from paft.train.stage import plan, train

SHORT = {"num_train_epochs": 1, "gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 1}


def broken(base: Path, out: Path, step: int = 3, **fields: Any) -> Any:
    """A training of four steps that died before step ``step``; its recipe."""
    made = recipe(base, trainer={**SHORT, **fields.pop("trainer", {})}, **fields)
    with pytest.MonkeyPatch.context() as patch:
        die_at(step, killed, patch.setattr)
        with pytest.raises(Killed):
            train(made, out, rows=SFT_ROWS, quiet=True)
    assert not out.exists()
    return made


def test_a_checkpoint_is_not_trampled_on(tiny_base: Path, tmp_path: Path) -> None:
    made = broken(tiny_base, tmp_path / "a")
    with pytest.raises(MismatchError, match=r"a\.partial holds an unfinished training, at step 3") as caught:
        train(made, tmp_path / "a", rows=SFT_ROWS, quiet=True)
    assert "--resume" in str(caught.value.hint) and "--overwrite" in str(caught.value.hint)
    other = made.model_copy(update={"trainer": {**made.trainer, "learning_rate": 1e-3}})
    with pytest.raises(MismatchError, match=r"trainer\.learning_rate was 0\.01, and is 0\.001"):
        train(other, tmp_path / "a", rows=SFT_ROWS, resume=True, quiet=True)
    with pytest.raises(MismatchError, match=r"begun otherwise: data\.train was "):
        train(made, tmp_path / "a", rows={"train": sft_rows(4), "eval": SFT_ROWS["eval"]}, resume=True, quiet=True)
    assert work.newest(tmp_path / "a.partial") is not None
    train(other, tmp_path / "a", rows=SFT_ROWS, resume=True, overwrite=True, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    train(other, tmp_path / "b", rows=SFT_ROWS, quiet=True)
    assert_same(tmp_path / "b", tmp_path / "a")


def test_the_base_is_compared_by_content_and_not_by_place(tiny_base: Path, tiny_tied_base: Path) -> None:
    begun = stage._begun(recipe(tiny_base), SFT_ROWS)
    assert work.difference(begun, json.loads(json.dumps({**begun, "recipe": {**begun["recipe"], "model": "elsewhere"}}))) is None
    assert "base was" in str(work.difference(begun, stage._begun(recipe(tiny_tied_base), SFT_ROWS)))


def test_resume_starts_what_was_not_begun_and_leaves_what_is_finished(tiny_base: Path, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(tiny_base, trainer=SHORT)
    first = train(made, tmp_path / "a", rows=SFT_ROWS, resume=True)
    again = train(made, tmp_path / "a", rows=SFT_ROWS, resume=True)
    assert first == again
    said = capsys.readouterr().err
    assert "holds no checkpoint; starting at the beginning" in said and "is finished already" in said
    with pytest.raises(MismatchError, match=r"a is finished, and not from this: seed was 0, and is 1"):
        train(recipe(tiny_base, trainer=SHORT, seed=1), tmp_path / "a", rows=SFT_ROWS, resume=True, quiet=True)


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tiny_base: Path, tmp_path: Path) -> None:
    made = broken(tiny_base, tmp_path / "a")
    (tmp_path / "a.partial" / "checkpoint-3" / work.PROGRESS).unlink()
    assert str(work.newest(tmp_path / "a.partial")).endswith("checkpoint-2")
    train(made, tmp_path / "a", rows=SFT_ROWS, resume=True, quiet=True)
    train(made, tmp_path / "b", rows=SFT_ROWS, quiet=True)
    assert_same(tmp_path / "b", tmp_path / "a")


def test_an_error_before_the_first_checkpoint_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    broken(tiny_base, tmp_path / "out" / "a", trainer={"save_steps": 500})
    assert not list((tmp_path / "out").iterdir())


FULL = [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672] . pos 64 vs 0")]


@pytest.mark.parametrize("error", FULL, ids=type)
def test_a_full_disk_is_told_and_half_a_checkpoint_gives_its_room_back(error: Exception, tiny_base: Path,
                                                                        tmp_path: Path) -> None:
    """The second is what torch.save says on a full tmpfs."""
    made = broken(tiny_base, tmp_path / "a", step=2)
    (tmp_path / "a.partial" / "checkpoint-3").mkdir()
    begun = stage._begun(made, SFT_ROWS)
    with (pytest.raises(ResourceError, match="disk full") as caught,
          work.work_dir(tmp_path / "a", begun, resume=True, overwrite=False, quiet=True)):
        (tmp_path / "a.partial" / "checkpoint-3").mkdir()
        raise error
    assert "--resume goes on from step 2" in str(caught.value.hint) and caught.value.exit_code == 5
    assert {path.name for path in (tmp_path / "a.partial").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_a_plan_tells_of_an_unfinished_training(tiny_base: Path, tmp_path: Path) -> None:
    made = broken(tiny_base, tmp_path / "a", data=write_rows(tmp_path / "rows.jsonl", sft_rows(8)))
    assert plan(made, tmp_path / "a")["unfinished"] == 3
    assert plan(made, tmp_path / "b")["unfinished"] is None


def test_two_processes_do_not_train_into_one_place(tiny_base: Path, tmp_path: Path) -> None:
    made = recipe(tiny_base, trainer=SHORT)
    begun = stage._begun(made, SFT_ROWS)
    with work.work_dir(tmp_path / "a", begun, resume=False, overwrite=False):
        with pytest.raises(MismatchError, match="another process is writing"):
            train(made, tmp_path / "a", rows=SFT_ROWS, overwrite=True, quiet=True)
        with pytest.raises(MismatchError, match="another process is writing"), output_dir(tmp_path / "a", overwrite=True):
            raise AssertionError("a merge, say, has begun where a training is at work")
        assert (tmp_path / "a.partial" / work.BEGUN).exists()


@pytest.mark.parametrize("saves", [1, 500])
def test_an_interrupt_is_one_line_that_says_how_to_go_on(saves: int, tiny_base: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(8))
    command = ["train-sft", "-m", str(tiny_base), "-d", data, "-o", str(tmp_path / "a"), "-q", "--set", "trainer.max_steps=3",
               "--set", f"trainer.save_steps={saves}"]

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        die_at(2, interrupt, patch.setattr)
        code = invoke(command)
    captured = capsys.readouterr().err.lstrip("\n")  # click closes the line of the terminal's ^C
    assert code == 130 and not (tmp_path / "a").exists()
    if saves == 500:
        assert captured == "error: interrupted; nothing half-made was kept\n"
        assert not (tmp_path / "a.partial").exists()
        return
    assert captured.splitlines() == [f"error: interrupted; {tmp_path / 'a.partial'} keeps step 2",
                                     "  try: the same command with --resume goes on from there"]
    assert invoke([*command, "--resume"]) == 0
    assert "3 steps" in capsys.readouterr().out
    assert invoke(command) == 3
    assert_one_error(capsys, 3, 3, "is not empty")
