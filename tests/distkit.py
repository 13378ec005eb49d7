"""What two processes of the distributed tests run: gloo on the CPU, one spawn for all of it, results as tensors on disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORLD = 2
TRAIN = {"max_steps": 3, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0,
         "max_grad_norm": 0.0, "logging_steps": 1, "use_cpu": True}
TOKENS = torch.arange(6, 38).reshape(4, 8)


def adapted(base: str) -> Any:
    """A tiny PEFT model with random factors, the same in every process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_of(model: Any, core: Any, rows: Tensor, l1: float) -> Tensor:
    """Mean squared logit of ``rows`` plus the penalty of ``core``: a loss that averages over equal shards of rows."""
    from paft.train.l1 import penalty

    return model(input_ids=rows).logits.square().mean() + penalty(core, l1=l1, l2=0.1)[0]


def gradients(core: Any) -> dict[str, Tensor]:
    from paft.train.l1 import whole

    return {name.removeprefix("module."): whole(p.grad) for name, p in core.named_parameters() if "lora_" in name}  # type: ignore[arg-type]


def step(core: Any, l1: float) -> dict[str, Tensor]:
    """An Adam step and a proximal step on the gradients that ``core`` has; the factors after it."""
    from paft.train.l1 import lora_factors, whole
    from paft.train.proximal import proximal_step

    parameters = [p for p in core.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=False)
    optimizer.step()
    proximal_step(lora_factors(core), optimizer, l1)
    return {name: whole(p.detach()) for name, p in core.named_parameters() if "lora_" in name}


def run(rank: int, base: str, out: str, port: int) -> None:
    """The work of one process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mine = TOKENS[rank * 2 : rank * 2 + 2]
    results = {"ddp": _ddp(base, mine), "fsdp2": _fsdp2(base, mine)}
    results["trainer"] = trained(base, Path(out) / f"scratch{rank}", batch=4)
    if rank == 0:
        torch.save(results, Path(out) / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _ddp(base: str, rows: Tensor) -> dict[str, Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    core = adapted(base)
    wrapped = DistributedDataParallel(core)  # it must outlive the backward pass, which it averages
    loss_of(wrapped, core, rows, 1e-3).backward()
    return gradients(core)


def _fsdp2(base: str, rows: Tensor) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    core, mesh = adapted(base), init_device_mesh("cpu", (WORLD,))
    for layer in core.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(core, mesh=mesh)
    loss_of(core, core, rows, 1e-3).backward()
    return {"gradients": gradients(core), "stepped": step(core, 1e-2), "saved": saved(core)}


def saved(core: Any) -> dict[str, Tensor]:
    """What a file of PEFT's holds of ``core``; every process takes part, the first writes."""
    from safetensors.torch import load_file

    from paft.train.artefact import state_of

    state = state_of(core)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        core.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
        return load_file(Path(folder) / "adapter_model.safetensors")


def trained(base: str, scratch: Path, batch: int) -> dict[str, Any]:
    """Factors, log and λ after an SFT run with ``batch`` rows a process."""
    from test_train_penalised import sft_trainer
    from trainkit import factors, start_away_from_zero

    options = {**TRAIN, "per_device_train_batch_size": batch}
    trainer = start_away_from_zero(sft_trainer(Path(base), scratch, l1=1e-3, trainer=options))
    trainer.train()
    return {"factors": factors(trainer), "log": trainer.state.log_history}
