"""UFT: instruction data and feedback in one loss, on TRL's KTOTrainer.

    z = β·log π(y|x)/π_ref(y|x)                          the implicit reward, log π summed over the answer's tokens (UFT, eq. 5)
    L = mean over rows of (σ(z) − r)²                    ``uft_loss: mse`` (eq. 6, g the squared error of σ(z); eq. 7 for r = 1)
    L = mean over rows of −r·log σ(z) − (1−r)·log σ(−z)  ``uft_loss: bce``

r = 1 for instruction rows. Feedback rows have r = 1 and 0 for the chosen and the rejected answer of a pair (two rows, read apart
from each other), r = 1 or 0 for a label, and a score in [0, 1] as it is. λ is the share of feedback rows among all that are
trained on, so that the expected loss is λ·L_feedback + (1−λ)·L_instruction (`paft.train.mixture`).

UFT (arXiv 2410.21438; UNA is the same loss without instruction data) trained with β = 0.01 and a rate of 3e-5; its best averages
are at λ = 0.5 and 0.56 (tables 4 and 5, of λ from 0.07). The authors' code scores a whole batch by its first rating and pairs
single answers with a dummy; here a loss is the same mean over rows at any batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from paft.data import Row
from paft.data.load import one_form
from paft.errors import MismatchError, UsageError
from paft.evaluate import Held
from paft.train import budget, losses, preference
from paft.train.dpo import PenalisedKTOTrainer
from paft.train.heldout import EVALUATED, HeldOut, check_pairs
from paft.train.mixture import Mixture
from paft.train.precompute import precompute
from paft.train.spending import Spending

if TYPE_CHECKING:
    from paft.recipe import JointRecipe
    from paft.train.optima import Optima
    from paft.train.reference import Reference

KINDS = ("sft", "pref")
NAMES = {"sft": "instruction", "pref": "feedback"}

# (z, r) -> the loss of each row
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda reward, target: mse_loss(reward.sigmoid(), target, reduction="none"),
    "bce": lambda reward, target: binary_cross_entropy_with_logits(reward, target, reduction="none"),
}

# Options of KTO that mean nothing here, and what to do instead.
REFUSED = {"loss_type": "set uft_loss", "desirable_weight": "lam is the share of feedback rows",
           "undesirable_weight": "lam is the share of feedback rows", "train_sampling_strategy": "rows are drawn by lam and seed"}


class WithKind(DataCollatorForUnpairedPreference):
    """TRL's collator, and ``feedback``: which rows are no instruction rows."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().torch_call(examples), "feedback": torch.tensor([each["feedback"] for each in examples])}


class Unified(Spending, PenalisedKTOTrainer):
    """L = mean over rows of (σ(z) − r)², or their cross-entropy, + penalty: see the module.

    Logged, as means over the rows of a record: the losses of either kind, ``uft_sft`` and ``uft_feedback``, and z in
    ``rewards/sft``, ``rewards/chosen`` (feedback with r > 1/2) and ``rewards/rejected`` (r < 1/2).
    """

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "feedback"]))

    def _get_train_sampler(self, train_dataset: Any = None) -> Mixture:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        recipe: Any = self.recipe
        return Mixture(rows["feedback"], recipe.lam, recipe.seed, lambda: int(self.state.epoch or 0))

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
                        fused_lm_head=True, **routed)
        reference = (inputs["ref_logps"] if self.precompute_ref_logps
                     else self.compute_ref_log_probs(self.ref_model or self.model, inputs)[0])
        reward = self.beta * (outputs.log_probs.sum(-1) - reference)
        recipe: Any = self.recipe
        losses = LOSSES[recipe.uft_loss](reward, inputs["label"])
        self._note(losses, reward, inputs)
        loss = losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._metrics["train" if self.model.training else "eval"]["aux_loss"].append(outputs.aux_loss.item())
        return (loss, outputs) if return_outputs else loss

    def _note(self, losses: Tensor, rewards: Tensor, inputs: Any) -> None:
        """One value a row into TRL's lists, which become means over a record's rows; one transfer from the device.

        `gather_for_metrics` would cut every micro-batch of an epoch's last step, all of which `Trainer` has fetched by then, to
        the length of the last one.
        """
        columns = [losses, rewards, inputs["label"], inputs["feedback"], inputs["attention_mask"].sum(1)]
        rows: Any = self.accelerator.gather(torch.stack([column.detach().float() for column in columns], dim=1))
        train = self.model.training
        metrics = self._metrics["train" if train else "eval"]
        for loss, reward, target, feedback, tokens in rows.tolist():
            metrics["uft_feedback" if feedback else "uft_sft"].append(loss)
            if not feedback:
                metrics["rewards/sft"].append(reward)
            elif target != 0.5:
                metrics["rewards/chosen" if target > 0.5 else "rewards/rejected"].append(reward)
            self._total_train_tokens += int(tokens) if train else 0
        metrics["num_tokens"] = [self._total_train_tokens]
        if train and self.accelerator.gradient_state.sync_gradients:
            self.close()

    @property
    def tokens(self) -> int:
        return self._total_train_tokens

    def tokens_a_step(self) -> float:
        """Mean tokens of an optimiser step, over all processes: λ of its rows are feedback."""
        rows: Any = self.train_dataset
        args, limit = self.args, self.args.max_length or 1 << 30
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        found: dict[bool, list[int]] = {True: [], False: []}
        for row in rows.select_columns(["prompt_ids", "completion_ids", "feedback"]):
            found[row["feedback"]].append(min(len(row["prompt_ids"]) + len(row["completion_ids"]), limit))
        recipe: Any = self.recipe
        shares = {True: recipe.lam, False: 1 - recipe.lam}
        return size * sum(shares[kind] * sum(each) / len(each) for kind, each in found.items() if each)

    def told(self) -> dict[str, Any]:
        """What an evaluation tells beside the losses: tokens trained on, prompts included."""
        return {"tokens": self.tokens}


class UFTTrainer(HeldOut, Unified):
    """The unified loss, with both objectives measured on held-out rows."""


def on_kto(recipe: JointRecipe) -> JointRecipe:
    """The recipe with the loss of TRL's that this one stands in for: that without a KL term, which would need rows of its own."""
    return recipe.model_copy(update={"loss": {"apo_zero_unpaired": 1.0}})


ROLE = "scored"


def config(recipe: JointRecipe) -> type:
    """KTOConfig: the loss stands in the place of one of KTO's trainer's."""
    return losses.family(on_kto(recipe)).load()[1]


def foreseen(recipe: JointRecipe, args: Any, rows: dict[str, list[Row]]) -> int:
    """Steps of the rows of either kind, each once an epoch; λ says in what shares."""
    return 0 if recipe.max_tokens else budget.of_epochs(args, len(answers(recipe, rows)))


def check(recipe: JointRecipe) -> None:
    """UsageError for settings that have no use in this loss, and for what it cannot do; loads no model."""
    budget.check(recipe)
    own = {"streaming": "its rows are drawn by lam and seed, so they have to be counted",
           "sft_trainer": "its options have no place in TRL's KTOTrainer",
           "sft_batch_size": "a batch holds both kinds: set trainer.per_device_train_batch_size"}
    for key, hint in own.items():
        if getattr(recipe, key):
            raise UsageError(f"{key} does not go with uft", hint=hint)
    if recipe.loss != type(recipe).model_fields["loss"].get_default():
        raise UsageError("uft is a loss itself, so --loss has no use", hint="leave it out; uft_loss is mse or bce")
    for key, hint in REFUSED.items():
        if key in recipe.trainer:
            raise UsageError(f"trainer.{key} has no use with uft", hint=hint)


def used(recipe: JointRecipe) -> list[str]:
    """The kinds of rows that λ gives a share to."""
    return [kind for kind, share in zip(KINDS, (1 - recipe.lam, recipe.lam), strict=True) if share]


def answers(recipe: JointRecipe, rows: dict[str, list[Row]]) -> list[Row]:
    """The rows that are trained on, as {prompt, completion, label: r, feedback: bool}; a pair is two of them.

    Raises UsageError for rows of plain ``text`` and for strings mixed with messages, MismatchError for a score out of [0, 1].
    """
    kinds = used(recipe)
    one_form([(f"the {NAMES[kind]} data", rows[kind]) for kind in kinds])
    found = [{"prompt": row["prompt"], "completion": row["completion"], "label": 1.0 if kind == "sft" else float(row["label"]),
              "feedback": kind == "pref"} for kind in kinds for row in _apart(rows[kind])]
    if odd := next((row for row in found if not 0 <= row["label"] <= 1), None):
        raise MismatchError(f"a score is {odd['label']:g}, not a number from 0 to 1", hint="scale the scores to [0, 1]")
    return found


def _apart(rows: list[Row]) -> Iterable[Row]:
    for row in rows:
        if "prompt" not in row:
            raise UsageError("uft needs instruction rows of prompt and answer, not of plain text",
                             hint="use prompt and completion columns, or conversations")
        yield from losses.unpair([row]) if "chosen" in row else [row]


def build(recipe: JointRecipe, model: Any, tokenizer: Any, rows: dict[str, list[Row]], scratch: str,
          reference: Reference | None = None, optima: Optima | None = None, *, quiet: bool = False) -> Any:
    """A trainer for ``recipe`` on ``rows`` = {"sft": instruction rows, "pref": pairs, labelled or scored rows}.

    Its ``train_dataset`` holds each row once, and an epoch reads that many rows, λ of them feedback. With "sft_eval" and
    "pref_eval" (pairs) both objectives are measured as for every joint method (`paft.train.heldout`). Raises what `check` and
    `answers` do, and MismatchError where a kind has no row.
    """
    check(recipe)
    given = answers(recipe, rows)
    _need(recipe, [row["feedback"] for row in given], "there is none in the data")
    held = Held(rows.get("sft_eval") or [], rows.get("pref_eval") or [], [])
    check_pairs(held.pref)
    trainer = preference.construct(on_kto(recipe), model, tokenizer, given, losses.unpair(held.pref), scratch, reference,
                                   kind=UFTTrainer, learning_rate=3e-6 if recipe.full else 3e-5,
                                   **(EVALUATED if held.pref else {}))
    trainer.data_collator = WithKind(**vars(trainer.data_collator))
    _need(recipe, trainer.train_dataset["feedback"], f"the prompt alone fills max_length={trainer.args.max_length}")
    trainer.hold(held, recipe, optima.held if optima else {})
    if recipe.max_tokens:
        trainer.args.max_steps = budget.bound(recipe.max_tokens, trainer.tokens_a_step())
        trainer.spend(recipe.max_tokens, trainer.args.max_steps)
    precompute(trainer, recipe.trainer.get("precompute_ref_log_probs"), quiet=quiet)
    return trainer


def _need(recipe: JointRecipe, marks: Iterable[bool], why: str) -> None:
    found = {KINDS[mark] for mark in marks}
    if lacks := [NAMES[kind] for kind in used(recipe) if kind not in found]:
        raise MismatchError(f"no {lacks[0]} row is left to train on: {why}",
                            hint="raise trainer.max_length, or set lam to 0 or 1 to train on one kind")
