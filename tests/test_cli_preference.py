"""`paft train-dpo` from the command line: losses with weights, references, one line for a mistake and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory, make_tokenizer, save_base
from datakit import write_jsonl
from trainkit import pref_rows
from variantkit import make

from paft.cli import invoke
from paft.provenance import read_manifest, write_manifest
from paft.train.losses import unpair


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    found = World(tiny_base, make_adapter, tmp_path)
    write_jsonl(found.pairs, pref_rows(24))
    return found


def command(world: World, *more: str) -> list[str]:
    return ["train-dpo", "-m", str(world.base), "-d", str(world.pairs), "-o", str(world.out), "--set", "trainer.max_steps=2",
            "--set", "trainer.per_device_train_batch_size=4", *more]


def test_weights_on_the_command_line(world: World) -> None:
    weights = {"ipo": {"ipo": 1}, "sigmoid,sft": {"sigmoid": 1, "sft": 1}, "sigmoid=1, sft=0.2": {"sigmoid": 1, "sft": 0.2}}
    for given, expected in weights.items():
        assert invoke(command(world, "--loss", given, "--overwrite")) == 0
        manifest = read_manifest(world.out)
        assert manifest and manifest["recipe"]["loss"] == expected


def test_labelled_rows_and_the_last_line(world: World, capsys: Capture) -> None:
    write_jsonl(world.pairs, unpair(pref_rows(24)))
    assert invoke(command(world, "--loss", "kto", "--eval-fraction", "0.3")) == 0
    out, err = capsys.readouterr()
    assert "held-out loss" in out and "margin" in out and "KL" in out
    assert all(len(line) <= 80 or str(world.folder) in line for line in out.splitlines())
    assert "Warning" not in err


def test_labels_out_of_balance_are_told_with_the_weight_that_mends_it(world: World, capsys: Capture) -> None:
    rows = unpair(pref_rows(24))
    write_jsonl(world.pairs, [row for i, row in enumerate(rows) if not row["label"] or i < 24])
    assert invoke(command(world, "--loss", "kto")) == 0
    note = "note: 12 desirable and 24 undesirable rows; KTO balances them with trainer.desirable_weight 2.00 to 2.67"
    assert note in capsys.readouterr().err
    assert invoke(command(world, "--loss", "kto", "--set", "trainer.desirable_weight=2.5", "--overwrite")) == 0
    assert "KTO balances" not in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--loss", "kto"], ["--reference", "{one}"]])
def test_streamed_rows(more: list[str], world: World) -> None:
    assert invoke(command(world, "--streaming", *(part.format(one=world.one) for part in more))) == 0
    manifest = read_manifest(world.out)
    assert manifest and manifest["metrics"]["steps"] == 2 and manifest["reference"]["precomputed"] is False


@pytest.mark.parametrize(("more", "said"), [
    ([], "the start model, adapter off"), (["--reference", "chosen-sft"], "an SFT on the chosen answers, trained first"),
    (["--reference", "{one}"], "on the same base"), (["--reference", "{other}"], "a second one in memory"),
    (["--loss", "orpo"], "")])
def test_the_plan_says_what_the_reference_is(more: list[str], said: str, world: World, capsys: Capture) -> None:
    other = save_base(world.folder / "other", tied=True, seed=1)
    more = [part.format(one=world.one, other=other) for part in more]
    assert invoke(command(world, *more, "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert said in (plan["reference"] or "") and bool(plan["reference"]) == bool(said)
    assert not world.out.exists()


def wrong_base(world: World) -> list[str]:
    write_manifest(world.one, command="train-sft", recipe={}, seed=0, base={"content_sha256": "0" * 64})
    return ["--reference", str(world.one)]


def wrong_shapes(world: World) -> list[str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(world.folder / "small")
    return ["--reference", str(make(world.folder / "small", world.folder / "odd"))]


def wrong_words(world: World) -> list[str]:
    other = shutil.copytree(world.base, world.folder / "other")
    tokenizer = make_tokenizer()
    text = tokenizer.backend_tokenizer.to_str().replace('"cat":', '"lion":')
    (other / "tokenizer.json").write_text(text)
    return ["--reference", str(other)]


def head(world: World) -> list[str]:
    return ["--reference", str(make(world.base, world.folder / "head", target_modules=["lm_head", "q_proj"]))]


def biases(world: World) -> list[str]:
    adapter = make(world.base, world.folder / "biased")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": "all"}))
    return ["--reference", str(adapter)]


def no_sum(world: World) -> list[str]:
    return ["--on", str(world.one), "--reference", str(make(world.base, world.folder / "dora", use_dora=True))]


def empty(world: World) -> list[str]:
    (world.folder / "empty").mkdir()
    return ["--reference", str(world.folder / "empty")]


def labels(world: World) -> list[str]:
    write_jsonl(world.pairs, [{"prompt": "a", "completion": " cat", "label": "good"}] * 4)
    return ["--loss", "kto"]


def no_labels(world: World) -> list[str]:
    write_jsonl(world.pairs, [{"prompt": "a", "completion": " cat"}] * 4)
    return ["--loss", "kto"]


def words(*given: str) -> Callable[[World], list[str]]:
    return lambda world: list(given)


MISTAKES = [
    (words("--loss", "sigmod"), 2, "there is no loss 'sigmod'"),
    (words("--loss", "kto,sft"), 2, "'kto' cannot be added"),
    (words("--loss", "sigmoid=much"), 2, "'much' is no weight"),
    (words("--loss", "sigmoid=-1"), 2, "loss.sigmoid: input should be greater than or equal to 0"),
    (words("--loss", "orpo", "--reference", "base"), 2, "loss orpo has no reference"),
    (words("--loss", "simpo", "--reference", "chosen-sft"), 2, "loss simpo has no reference"),
    (words("--loss", "orpo", "--set", "trainer.label_smoothing=0.1"), 2, "not an option of TRL's ORPOConfig"),
    (words("--loss", "kto", "--set", "trainer.per_device_train_batch_size=1"), 2, "per_device_train_batch_size >= 2"),
    (words("--set", "trainer.loss_type=ipo"), 2, "trainer.loss_type is set by `loss`"),
    (words("--set", "trainer.sync_ref_model=true"), 2, "You passed `sync_ref_model=True`"),
    (words("--set", "trainer.padding_free=true"), 2, "trainer.padding_free has no effect"),
    (words("--loss", "orpo", "--set", "trainer.max_length=null"), 2, "loss orpo needs trainer.max_length"),
    (words("--loss", "simpo", "--streaming"), 2, "loss simpo cannot stream"),
    (words("--reference", "chosen-sft", "--streaming"), 2, "reads the rows twice"),
    (words("-q", "--streaming", "--set", "trainer.precompute_ref_log_probs=true"), 2, "not possible for streamed rows"),
    (words("--reference", "chosen_sft"), 2, "there is no reference 'chosen_sft'"),
    (words("--reference", "./nowhere"), 4, "no reference at ./nowhere"),
    (words("--reference", "chosen-sft", "--set", "reference_sft.max_stps=1"), 2, "trainer.max_stps is not an option"),
    (words("--set", "reference_sft.max_steps=1"), 2, "reference_sft has a use with reference: chosen-sft only"),
    (empty, 4, "is neither an adapter nor a model"), (labels, 2, "`label` is 'good', not true or false"),
    (no_labels, 2, "none of the layouts for unpaired"), (wrong_base, 3, "was trained on a base of content 000000000000"),
    (wrong_shapes, 3, "odd"), (wrong_words, 3, "has another vocabulary: 'cat' is id"), (head, 3, "changes lm_head"),
    (biases, 3, "brings biases"), (no_sum, 3, "which no sum of LoRAs can say")]


@pytest.mark.parametrize(("spoil", "code", "said"), MISTAKES, ids=[said for _, _, said in MISTAKES])
def test_mistakes(spoil: Callable[[World], list[str]], code: int, said: str, world: World, capsys: Capture) -> None:
    arguments = command(world, *spoil(world))
    before = sorted(world.folder.iterdir())
    capsys.readouterr()
    assert_one_error(capsys, invoke(arguments), code, said)
    assert sorted(world.folder.iterdir()) == before
