"""Pretrain a base of the demo from nothing: ``python -m paft.demo.pretrain --seed 0 -o DIR``.

A Llama of 0.84M parameters (width 128, 4 layers, 4 heads, tied embeddings) reads plain documents of `paft.demo.world`
for a few minutes on 2 cores. Loss: the mean cross-entropy per token over windows of whole documents, each ended by
``<eos>``. AdamW (betas 0.9, 0.95, weight decay 0.05), linear warm-up, cosine to zero, gradients clipped at norm 1. The
result is rounded to bfloat16 once, checked in that form, and written as a plain Hugging Face directory with a
`paft.json`.
A plain loop on purpose: what it shows is the data, and it has no stage that the training of adapters would share.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paft.demo.tokenizer import EOS_ID, MAX_LENGTH, PAD_ID, build_tokenizer
from paft.demo.world import SPLITS, plain_forms, pretraining_documents
from paft.provenance import output_dir, write_manifest

STEPS, BATCH, PEAK_LR, WARM_UP = 1500, 32, 3e-3, 100
IGNORED = -100


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised base in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=EOS_ID, pad_token_id=PAD_ID, initializer_range=0.05)
    return LlamaForCausalLM(config)


def windows(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, batch: int) -> Iterator[torch.Tensor]:
    """Endless (batch, 128) windows of token ids: whole documents, each ended by ``<eos>``, then padding."""
    vocabulary, rows, row = tokenizer.get_vocab(), [], []
    for document in documents:
        ids = [*(vocabulary[word] for word in document.split()), EOS_ID]
        if len(row) + len(ids) > MAX_LENGTH:
            rows.append(row + [PAD_ID] * (MAX_LENGTH - len(row)))
            row = []
        row += ids
        if len(rows) == batch:
            yield torch.tensor(rows)
            rows = []


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine that ends at zero."""
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def pretrain(seed: int, steps: int = STEPS, batch: int = BATCH) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a base; ``seed`` sets its first weights and the documents it reads. Progress goes to stderr."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    source = windows(pretraining_documents(seed), tokenizer, batch)
    progress = tqdm(range(steps), desc=f"pretraining, seed {seed}", mininterval=2.0)
    for step in progress:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids = next(source)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids.eq(PAD_ID), IGNORED)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model, tokenizer


@torch.no_grad()
def plain_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast,
                   forms: list[tuple[str, str, str]]) -> dict[str, float]:
    """Share of `plain_forms` whose every completion token is the most likely one, per task and over all (``"all"``)."""
    right: dict[str, list[bool]] = {}
    model.eval()
    for start in range(0, len(forms), 256):
        part = forms[start:start + 256]
        batch = tokenizer([f"{prefix} {completion}" for _, prefix, completion in part], padding=True,
                          padding_side="right", return_tensors="pt", return_token_type_ids=False)
        hits = model(**batch).logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
        for row, (task, prefix, completion) in enumerate(part):
            begin = len(prefix.split()) - 1
            right.setdefault(task, []).append(bool(hits[row, begin:begin + len(completion.split())].all()))
    accuracy = {task: sum(hits) / len(hits) for task, hits in right.items()}
    return accuracy | {"all": sum(map(sum, right.values())) / len(forms)}


def main() -> None:
    """Pretrain, round to bfloat16, check the plain forms, write."""
    parser = argparse.ArgumentParser(prog="python -m paft.demo.pretrain", description="Pretrain a base of the demo.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the text (default 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps (default {STEPS})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that is not empty")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begun = time.monotonic()
    with output_dir(options.output, overwrite=options.overwrite) as scratch:
        model, tokenizer = pretrain(options.seed, options.steps)
        model = model.bfloat16()
        accuracy = {split: plain_accuracy(model, tokenizer, plain_forms(split)) for split in SPLITS}
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        recipe = {"steps": options.steps, "batch": BATCH, "window": MAX_LENGTH, "peak_lr": PEAK_LR, "warm_up": WARM_UP}
        write_manifest(scratch, command="python -m paft.demo.pretrain", recipe=recipe, seed=options.seed,
                       metrics={"plain_accuracy": accuracy}, wall_s=round(time.monotonic() - begun, 1))
    for task, share in accuracy["test"].items():
        print(f"{task:10s} {share:.4f}")
    print(f"wrote {options.output}; plain forms of the test split right: {accuracy['test']['all']:.2%}")


if __name__ == "__main__":
    main()
