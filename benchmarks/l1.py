"""What the L1 term costs in a training step: paft's tiled term, plain autograd, and no term, in turns in one process.

    python benchmarks/l1.py MODEL [--steps 4] [--batch 4] [--length 256] [--rank 16] [-o benchmarks/l1.json]

A step is forward, backward and AdamW on random tokens, LoRA on all linear layers, float32 on a CPU and bfloat16 autocast on a
GPU. The variants take turns step by step, and the medians are compared: wall time on a GPU, the process's CPU time on a CPU,
where other work on the machine would drown a few per cent. Memory is the peak of what the term alone allocates in its forward
and backward pass, above what was there before: counted by allocations in torch's profiler on a CPU, by the allocator on a GPU.
A "record" is what a log record measures on top (sparsity, norms, the rms entry gradient), once in `logging_steps` steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXPECTED = {
    "cpu_percent": 5, "gpu_percent": 3, "memory_percent": 2,
    "reason": "SmolLM2-135M, r 16: 10 GFLOP in three thin products a layer and two passes over 106M entries, about 0.6 s, beside "
              "0.83 TFLOP of forward and backward, about 14 s on two cores; memory: factor-sized gradients and one tile.",
}


def model_with_lora(path: str, rank: int) -> Any:
    """The base in float32 with LoRA on all linear layers, B moved away from zero so that signs are signs."""
    import torch
    from peft import LoraConfig, get_peft_model

    from paft.models import load_model

    torch.manual_seed(0)
    model: Any = get_peft_model(load_model(path), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return model.train()


def naive(model: Any) -> Any:
    """λ·Σ|s·B·A| as one would write it: every product stays in the graph until the backward pass."""
    from paft.train.l1 import lora_factors

    return sum((s * B @ A).abs().sum() for _, A, B, s in lora_factors(model))


def tiled(model: Any) -> Any:
    from paft.train.l1 import penalty

    return penalty(model, l1=1.0, l2=0.0)[0]


def step(model: Any, optimizer: Any, tokens: Any, term: Callable[[Any], Any] | None) -> float:
    """Seconds of one optimiser step."""
    import torch

    synchronise(tokens)
    started = clock(tokens)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
        loss = model(input_ids=tokens, labels=tokens).loss
    if term:
        loss = loss + 1e-6 * term(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronise(tokens)
    return clock(tokens) - started


def clock(tokens: Any) -> float:
    return time.perf_counter() if tokens.is_cuda else time.process_time()


def synchronise(tokens: Any) -> None:
    import torch

    if tokens.is_cuda:
        torch.cuda.synchronize()


def record(model: Any, tokens: Any) -> float:
    """Seconds of what a log record measures."""
    from paft.train.gauge import entry_gradient, gauge
    from paft.train.l1 import lora_factors

    tiled(model).backward()
    started = clock(tokens)
    gauge(model)
    entry_gradient((each, each.B.grad) for each in lora_factors(model))  # type: ignore[misc]
    taken = clock(tokens) - started
    model.zero_grad()
    return taken


def peak_bytes(work: Callable[[], None], cuda: bool) -> int:
    """The most that ``work`` holds at once above what was held before it."""
    import torch

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    model = model_with_lora(options.model, options.rank)
    device = next(model.parameters()).device
    tokens = torch.randint(0, model.config.vocab_size, (options.batch, options.length), device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # gradients are there in any step; they are not the term's
        parameter.grad = torch.zeros_like(parameter)
    terms = {"none": None, "paft": tiled, "naive": naive}
    memory = {name: peak_bytes(lambda term=term: term(model).backward(), tokens.is_cuda) for name, term in terms.items() if term}
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    times: dict[str, list[float]] = {name: [] for name in terms}
    for turn in range(options.steps + 1):
        for name, term in terms.items():
            taken = step(model, optimizer, tokens, term)
            if turn:  # the first of each warms up
                times[name].append(taken)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "device": str(device), "tokens": options.batch * options.length, "rank": options.rank, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
        "seconds": seconds, "all_seconds": times, "memory_bytes": memory, "record_seconds": record(model, tokens),
        "percent": {name: 100 * (seconds[name] / seconds["none"] - 1) for name in ("paft", "naive")},
        "memory_percent": 100 * memory["paft"] / memory["naive"], "expected": EXPECTED,
    }


def table(found: dict[str, Any]) -> str:
    lines = ["| term | step, s | over none | extra peak memory |", "|---|---|---|---|"]
    for name, seconds in found["seconds"].items():
        over = f"{found['percent'][name]:+.1f} %" if name in found["percent"] else ""
        size = f"{found['memory_bytes'][name] / 1e6:.1f} MB" if name in found["memory_bytes"] else ""
        lines.append(f"| {name} | {seconds:.2f} | {over} | {size} |")
    lines.append(f"\nmemory: {found['memory_percent']:.1f} % of naive's; a log record: {found['record_seconds']:.2f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, default in (("steps", 4), ("batch", 4), ("length", 256), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    from paft.models import quiet_libraries

    quiet_libraries()
    found = {"model": Path(options.model).name, **measure(options)}
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
