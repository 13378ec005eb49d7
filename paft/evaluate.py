"""Both objectives on held-out data, for any model: what SFT minimises, what DPO minimises, and what is forgotten.

    sft_loss       -Σ log π(answer | prompt) / Σ answer tokens           (nats a token)
    dpo_loss       mean of -log σ(β·Δ),  Δ = [log π/π_ref](chosen) - [log π/π_ref](rejected), summed over answer tokens
    pref_accuracy  share of pairs with Δ > 0 (Δ = 0 counts one half, so the reference itself scores 0.5)
    text_loss      cross-entropy on neutral text: rises when the model forgets
    exact_match    share of greedy answers equal to the reference answer, white space aside
    opener, fact, closer   what the demo's judge finds in the greedy answers to the demo's preference prompts

π_ref is the base for every candidate, whatever it was trained against, so that rows of one table can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paft.data import Row
from paft.recipe import Sources
from paft.tokens import encode, prompt_ids

Judge = Callable[[str, Row], Mapping[str, bool]]  # (answer, preference row) -> what is right about it


def judge_of(source: Sources | None) -> Judge | None:
    """The judge of a preference source's answers: the demo has one, other data none."""
    if not isinstance(source, str) or source.split(":")[:2] != ["demo", "pref"]:
        return None
    from paft.demo.judge import style

    return style


@dataclass(frozen=True)
class Held:
    """Held-out rows of one split: SFT rows, preference rows, neutral text (each may be empty)."""

    sft: list[Row]
    pref: list[Row]
    text: list[Row]

    def head(self, rows: int | None) -> Held:
        """At most ``rows`` of each kind."""
        return self if rows is None else Held(self.sft[:rows], self.pref[:rows], self.text[:rows])


@dataclass(frozen=True)
class Evaluator:
    """Scores models on ``held``; ``reference`` holds the base's (chosen, rejected) log-probabilities."""

    tokenizer: Any
    held: Held
    reference: tuple[Tensor, Tensor] | None = None
    beta: float = 0.1
    batch_size: int = 64
    generate: int = 0
    judge: Judge | None = None
    limit: int | None = None  # tokens of a row that are scored; None: what the model has positions for
    share: tuple[int, int] = (0, 1)  # (i, n): this is process i of n, which all score their part of the batches

    def against(self, base: torch.nn.Module) -> Evaluator:
        """The same evaluator with ``base`` as the DPO reference."""
        base.eval()
        return replace(self, reference=self._pairs(base))

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """All metrics that the held-out rows allow, as plain floats."""
        model.eval()
        scores: dict[str, float] = {}
        if self.held.sft:
            scores["sft_loss"] = self._mean_loss(model, self.held.sft)
        if self.held.pref and self.reference is not None:
            scores.update(self._preference(model))
        if self.held.text:
            scores["text_loss"] = self._mean_loss(model, self.held.text)
        if self.generate:
            scores.update(self._generated(model))
        return {key: round(value, 6) for key, value in scores.items()}

    def _mean_loss(self, model: torch.nn.Module, rows: list[Row]) -> float:
        total, count = self._logps(model, [encode(self.tokenizer, row, "completion") for row in rows])
        return -(total.sum() / count.sum().clamp(min=1)).item()

    def _preference(self, model: torch.nn.Module) -> dict[str, float]:
        assert self.reference is not None
        chosen, rejected = self._pairs(model)
        margin = (chosen - self.reference[0]) - (rejected - self.reference[1])
        accuracy = (margin > 0).double().mean() + 0.5 * (margin == 0).double().mean()
        return {"dpo_loss": -torch.nn.functional.logsigmoid(self.beta * margin).mean().item(), "pref_accuracy": accuracy.item()}

    def _pairs(self, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        pairs = [(encode(self.tokenizer, row, "chosen"), encode(self.tokenizer, row, "rejected")) for row in self.held.pref]
        # Where a token merges across the boundary in one answer only, TRL scores that token in both.
        starts = [min(chosen[1], rejected[1]) for chosen, rejected in pairs]
        sides = ([(pair[side][0], start) for pair, start in zip(pairs, starts, strict=True)] for side in (0, 1))
        chosen, rejected = (self._logps(model, coded)[0] for coded in sides)
        return chosen, rejected

    def _logps(self, model: torch.nn.Module, coded: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        found = answer_logps(model, coded, self.tokenizer.pad_token_id, self.batch_size, self.limit, self.share)
        if self.share[1] == 1:
            return found
        from accelerate.utils import reduce

        total, count = (reduce(each.to(model.device), "sum").cpu() for each in found)  # type: ignore[union-attr]
        return total, count

    def _generated(self, model: torch.nn.Module) -> dict[str, float]:
        scores: dict[str, float] = {}
        asked = [row for row in self.held.sft if "prompt" in row]
        if asked:
            texts = self.answers(model, asked)
            scores["exact_match"] = _mean(t.split() == _text(r["completion"]).split() for t, r in zip(texts, asked, strict=True))
        if self.judge and self.held.pref:
            found = [self.judge(t, r) for t, r in zip(self.answers(model, self.held.pref), self.held.pref, strict=True)]
            scores.update({key: _mean(one[key] for one in found) for key in found[0]})
        return scores

    @torch.no_grad()
    def answers(self, model: Any, rows: list[Row], **sampling: Any) -> list[str]:
        """Greedy answers of at most ``generate`` tokens to the rows' prompts, special tokens removed.

        A prompt that leaves no room for them loses its beginning. ``sampling``: `generate`'s own options, for answers that are
        drawn (do_sample, temperature).
        """
        tokenizer, texts = self.tokenizer, []
        room = max(1, _positions(model) - self.generate)
        for start in range(0, len(rows), 4 * self.batch_size):
            prompts = [prompt_ids(tokenizer, row["prompt"])[-room:] for row in rows[start : start + 4 * self.batch_size]]
            width = max(map(len, prompts))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=self.generate,
                                 pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                                 **{"do_sample": False, **sampling})
            texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return texts


def _positions(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


@torch.no_grad()
def answer_logps(model: Any, coded: Sequence[tuple[list[int], int]], pad: int, batch_size: int,
                 limit: int | None = None, share: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """(summed log-probability, number of tokens) of each answer, float64 on the CPU, in the order given.

    Rows are cut at ``limit`` or the model's ``max_position_embeddings``; what is cut off counts nothing. Of n processes with
    ``share`` = (i, n) each has its own batches, and zeros elsewhere: the sum of all is what one would find, bit for bit. They
    call the model equally often (the last batch again), as a model that is sharded over them needs.
    """
    total, count = torch.zeros(len(coded), dtype=torch.float64), torch.zeros(len(coded), dtype=torch.float64)
    limit = min(limit or _positions(model), _positions(model))
    groups = list(_batches([len(ids) for ids, _ in coded], batch_size))
    mine, processes = share
    for turn in range(mine, math.ceil(len(groups) / processes) * processes, processes):
        group = groups[min(turn, len(groups) - 1)]
        width = min(max(len(coded[i][0]) for i in group), limit)
        ids = torch.full((len(group), width), pad)
        wanted = torch.zeros((len(group), width), dtype=torch.bool)
        mask = torch.zeros((len(group), width), dtype=torch.long)
        for row, i in enumerate(group):
            tokens, start = coded[i]
            tokens = tokens[:width]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            wanted[row, max(start, 1) : len(tokens)] = True
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, :-1]
        picked = wanted[:, 1:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[picked].float(), ids[:, 1:].to(logits.device)[picked], reduction="none")
        rows = torch.tensor(group)[picked.nonzero()[:, 0].cpu()]
        if turn >= len(groups):
            continue
        total.index_add_(0, rows, -loss.double().cpu())
        count.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
    return total, count


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _mean(values: Any) -> float:
    values = [float(value) for value in values]
    return sum(values) / max(len(values), 1)


def _text(messages: str | list[Row]) -> str:
    return messages if isinstance(messages, str) else " ".join(turn["content"] for turn in messages)
