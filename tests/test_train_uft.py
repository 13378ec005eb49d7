"""The unified loss: against its definition in float64, against TRL's, over kinds of rows and references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from test_train_reference import laid_on
from torch.nn.functional import softplus
from trainkit import as_chat, distance, factors, identical, parts, pref_rows, sft_rows, start_away_from_zero
from transformers import AutoModelForCausalLM
from trl.trainer.kto_config import KTOConfig
from uftkit import FEEDBACK, ROWS, TARGETS, JointRecipe, batch, explicit, in_float64, ours, rewards, value_and_gradient
from variantkit import ARCHITECTURES, wrapped

from paft.data import dataset
from paft.errors import MismatchError, UsageError
from paft.train import uft
from paft.train.dpo import PenalisedKTOTrainer
from paft.train.losses import unpair
from paft.train.options import lora_config, trainer_config

KIND = pytest.mark.parametrize("kind", ["mse", "bce"])
BATCHES = {"one instruction": [2], "one score": [11], "feedback only": [12, 9, 6], "instruction only": [0, 1, 4],
           "all kinds": [11, 0, 5, 6, 3, 9, 10, 12]}


@KIND
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("reference", ["base", "adapter"])
def test_value_and_gradient_are_the_definitions(kind: Any, name: str, reference: str, tiny_base: Path,
                                                make_adapter: AdapterFactory, tmp_path: Path) -> None:
    """Log-probabilities of transformers' own logits in float64, one row at a time; β is large, so that σ is no straight line."""
    other = make_adapter(tiny_base, seed=3) if reference == "adapter" else None
    trainer = start_away_from_zero(ours(tiny_base, tmp_path, uft_loss=kind, beta=2.0, held=laid_on(other) if other else None,
                                        trainer={"precompute_ref_log_probs": False}))
    fixed = wrapped(tiny_base, other) if other else AutoModelForCausalLM.from_pretrained(tiny_base)
    policy, chosen = in_float64(trainer, tiny_base), BATCHES[name]
    given = uft.answers(trainer.recipe, ROWS)
    z = rewards(trainer, policy, fixed.double().eval(), [given[index] for index in chosen])
    assert z.abs().max() > 0.1
    expected = explicit(kind, z, TARGETS[chosen]).mean()
    expected.backward()
    value, slopes = value_and_gradient(trainer, chosen)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    wanted = {key: p.grad for key, p in policy.named_parameters() if p.grad is not None}
    assert slopes.keys() == wanted.keys()
    assert distance(slopes, wanted) < 1e-5 * max(float(slope.abs().max()) for slope in wanted.values())


@KIND
def test_a_batch_is_the_mean_of_its_rows(kind: Any, tiny_base: Path, tmp_path: Path) -> None:
    trainer = start_away_from_zero(ours(tiny_base, tmp_path, uft_loss=kind))
    rows = BATCHES["all kinds"]
    value, slopes = value_and_gradient(trainer, rows)
    singles = [value_and_gradient(trainer, [row]) for row in rows]
    assert value == pytest.approx(sum(single for single, _ in singles) / 8, rel=1e-6)
    mean = {name: torch.stack([slope[name] for _, slope in singles]).mean(0) for name in slopes}
    assert distance(slopes, mean) < 1e-5 * max(float(slope.abs().max()) for slope in slopes.values())


def test_one_row_is_the_square_of_trls_unpaired_apo(tiny_base: Path, tmp_path: Path) -> None:
    """TRL's loss without a KL term is |σ(z) − label| of a row, from log-probabilities and a reference of its own code."""
    trainer = start_away_from_zero(ours(tiny_base, tmp_path, {"sft": [], "pref": pref_rows(3)}, lam=1.0, beta=1.0))
    model, tokenizer = parts(tiny_base)
    args = trainer_config(KTOConfig, trainer.recipe, str(tmp_path), loss_type="apo_zero_unpaired", beta=1.0)
    theirs: Any = PenalisedKTOTrainer(model=model, args=args, processing_class=tokenizer,
                                      train_dataset=dataset(unpair(pref_rows(3))), peft_config=lora_config(trainer.recipe.lora))
    theirs.recipe = trainer.recipe
    start_away_from_zero(theirs).model.load_state_dict(trainer.model.state_dict())
    for row in range(6):
        apo = value_and_gradient(theirs, [row])[0]
        assert value_and_gradient(trainer, [row])[0] == pytest.approx(apo ** 2, rel=1e-5)
        assert abs(apo - 0.5) > 1e-3


def test_cross_entropy_is_stable_and_soft() -> None:
    """−r·log σ(z) − (1−r)·log σ(−z), log σ(z) = −softplus(−z); at z = ±200 a logarithm of σ would be infinite."""
    z = torch.tensor([-200.0, -3.0, 0.0, 0.7, 200.0], requires_grad=True)
    for r in (0.0, 0.25, 1.0):
        found = uft.LOSSES["bce"](z, torch.full_like(z, r))
        assert torch.allclose(found, r * softplus(-z) + (1 - r) * softplus(z), rtol=1e-6)
        (slope,) = torch.autograd.grad(found.sum(), z)
        assert torch.allclose(slope, z.sigmoid() - r, atol=1e-6)


def learned(base: Path, scratch: Path, rows: Any, **fields: Any) -> Any:
    trainer = ours(base, scratch, rows, **{"trainer": {"max_steps": 5, "per_device_train_batch_size": 3, "learning_rate": 1e-2,
                                                       "warmup_steps": 0}, **fields})
    before = factors(trainer)
    trainer.train()
    assert distance(before, factors(trainer)) > 1e-3
    return factors(trainer)


def test_pairs_labels_and_scores_of_0_and_1_are_one(tiny_base: Path, tmp_path: Path) -> None:
    pairs = pref_rows(4)
    labels = unpair(pairs)
    scores = [{**row, "label": float(row["label"])} for row in labels]
    one, *others = (learned(tiny_base, tmp_path, {"sft": sft_rows(3), "pref": rows}) for rows in (pairs, labels, scores))
    assert all(identical(one, other) for other in others)
    flipped = [{**row, "label": not row["label"]} for row in labels]
    assert not identical(one, learned(tiny_base, tmp_path, {"sft": sft_rows(3), "pref": flipped}))


@pytest.mark.parametrize("laid", [False, True])
def test_a_precomputed_reference_is_the_live_one(laid: bool, tiny_base: Path, make_adapter: AdapterFactory,
                                                 tmp_path: Path) -> None:
    held = laid_on(make_adapter(tiny_base, seed=3)) if laid else None
    once, each = (ours(tiny_base, tmp_path, held=held, beta=1.0, trainer={"precompute_ref_log_probs": flag})
                  for flag in (True, False))
    assert "ref_logps" in once.train_dataset.column_names and "ref_logps" not in each.train_dataset.column_names
    for trainer in (once, each):
        start_away_from_zero(trainer)
    rows = BATCHES["all kinds"]
    (one, slopes), (other, live) = (value_and_gradient(trainer, rows) for trainer in (once, each))
    assert one == pytest.approx(other, rel=1e-5)
    assert distance(slopes, live) < 1e-5
    once.train_dataset = once.train_dataset.map(lambda row: {"ref_logps": row["ref_logps"] + 1})
    assert value_and_gradient(once, rows)[0] != pytest.approx(other, rel=1e-2), "so the column is read"


def test_experts_are_balanced_as_trl_does(tiny_base: Path, tmp_path: Path) -> None:
    """The router's loss, with its coefficient, once a batch."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("qwen3_moe", **{**ARCHITECTURES["qwen3_moe"], "vocab_size": 64})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    parts(tiny_base)[1].save_pretrained(tmp_path / "base")
    with_, without = (ours(tmp_path / "base", tmp_path, trainer={"router_aux_loss_coef": coef}) for coef in (0.5, 0.0))
    rows = BATCHES["all kinds"]
    value, bare = value_and_gradient(with_, rows)[0], value_and_gradient(without, rows)[0]
    assert value - bare == pytest.approx(0.5 * with_._metrics["train"]["aux_loss"][-1], rel=1e-4)
    assert value - bare > 0.1


def test_conversations(tiny_base: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_base, tmp_path, {"sft": sft_rows(3, chat=True), "pref": pref_rows(2, chat=True)})
    ids = batch(trainer, [0])
    answered = ids["input_ids"][ids["completion_mask"].bool()]
    assert trainer.processing_class.decode(answered).split()[:3] == sft_rows(3)[0]["completion"].split()


@pytest.mark.parametrize(("rows", "fields", "error", "said"), [
    ({"sft": [{"text": "cat"}], "pref": []}, {"lam": 0.0}, UsageError, "not of plain text"),
    ({"sft": [as_chat(row) for row in sft_rows(2)], "pref": FEEDBACK}, {}, UsageError, "the instruction data holds messages"),
    ({"sft": sft_rows(2), "pref": [{**FEEDBACK[4], "label": 1.5}]}, {}, MismatchError, "a score is 1.5"),
    ({"sft": sft_rows(2), "pref": [{**FEEDBACK[4], "label": float("nan")}]}, {}, MismatchError, "a score is nan"),
    ({"sft": sft_rows(2), "pref": []}, {}, MismatchError, "no feedback row"),
    ({"sft": [{"prompt": "cat " * 9, "completion": " dog"}], "pref": FEEDBACK}, {"trainer": {"max_length": 8}}, MismatchError,
     "no instruction row is left to train on: the prompt alone fills max_length=8"),
    ({**ROWS, "pref_eval": FEEDBACK[4:], "sft_eval": sft_rows(2)}, {}, UsageError, "held-out feedback is no pairs"),
    (ROWS, {"max_tokens": 100, "trainer": {"max_steps": 3}}, UsageError, "one budget"),
    (ROWS, {"streaming": True}, UsageError, "streaming does not go with uft"),
    (ROWS, {"sft_batch_size": 2}, UsageError, "sft_batch_size does not go with uft"),
    (ROWS, {"loss": {"ipo": 1}}, UsageError, "uft is a loss itself"),
    (ROWS, {"trainer": {"desirable_weight": 2.0}}, UsageError, "desirable_weight has no use"),
    (ROWS, {"trainer": {"train_sampling_strategy": "random"}}, UsageError, "train_sampling_strategy has no use")])
def test_refusals(rows: Any, fields: Any, error: Any, said: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=said) as caught:
        ours(tiny_base, tmp_path, rows, **fields)
    assert caught.value.hint


def test_the_recipe_says_which_loss() -> None:
    assert set(uft.LOSSES) == {"mse", "bce"} and JointRecipe().uft_loss == "mse"
