"""A base model and its tokenizer, checked for what later goes wrong silently: chat template, eos, pad."""

from __future__ import annotations

import importlib.util
import logging as stdlib_logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft import hub
from paft.data.template import choose_template
from paft.errors import MismatchError, NotFoundError, ResourceError

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def free_cores() -> int:
    """Cores this process may use: its CPU affinity, cut to the container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def set_threads() -> None:
    """As many threads as free cores, which wait passively; call it before anything imports torch. OMP_NUM_THREADS wins.

    OpenMP's threads spin between operations by default, and where another process wants the same cores that made a merge of
    the demo base take 13 s instead of 0.2 s.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(free_cores())


def quiet_libraries() -> None:
    """`set_threads`, and silence for chatter; call it before anything imports torch."""
    set_threads()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # TRL and PEFT still use names that transformers renames; their users cannot act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl|peft)")
    from transformers.utils import logging

    logging.set_verbosity_error()
    stdlib_logging.getLogger("trl").setLevel(stdlib_logging.ERROR)  # paft says in a line what matters of its warnings
    logging.disable_progress_bar()


def device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def sharded() -> bool:
    """Was this process launched to hold a part of each tensor (FSDP)? As `accelerate launch` says it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def resolve_base(name: str) -> Path:
    """The directory of a base model; NotFoundError unless it holds a config."""
    path = hub.resolve(name, kind="model", patterns=hub.MODEL_FILES)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise MismatchError(f"{name} is an adapter, not a base model", hint="pass its base as --model, and it as --on")
    if not (path / "config.json").is_file():
        raise NotFoundError(f"{name} is no model: it has no config.json")
    return path


def load_tokenizer(name: str, *, chat: bool = True, template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token; MismatchError without a chat template when ``chat`` data needs one.

    ``template``: a shipped name or a file (`paft.data.template`), in place of the model's own.
    """
    from transformers import AutoTokenizer

    path = resolve_base(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise NotFoundError(f"{name} has no tokenizer that transformers can load: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise MismatchError(f"the tokenizer of {name} has no eos token: a model trained with it would never stop",
                            hint="set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        # Labels are masked by position, not by id, so sharing eos with pad is safe here.
        tokenizer.pad_token = tokenizer.eos_token
    if template:
        choose_template(tokenizer, template)
    if chat and not tokenizer.chat_template:
        raise MismatchError(f"{name} has no chat template, and the data is conversational",
                            hint="choose one, for example --chat-template zephyr, or use prompt / completion strings")
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(name: str, *, on: str | None = None, dtype: str = "float32", quantize: str | None = None) -> PreTrainedModel:
    """The base in ``dtype`` on the default device; with ``on`` that adapter's ΔW is folded in, in float32.

    ``quantize="4bit"``: the linear layers as NF4, doubly quantised (QLoRA, arXiv 2305.14314), by bitsandbytes. Raises
    NotFoundError / MismatchError for what is missing or does not fit, ResourceError without bitsandbytes.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = resolve_base(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32" if on else dtype, use_safetensors=True,
                                                           output_loading_info=True, **_quantized(quantize))
    except (OSError, ValueError) as error:
        raise NotFoundError(f"cannot load {name}: {_first_line(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        raise MismatchError(f"cannot load {name}: {_first_line(error)}", hint="copy or download it again") from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers would draw them at random and say so in a log that nobody reads.
        raise MismatchError(f"{name} lacks tensors that its config asks for: {', '.join(sorted(info['missing_keys'])[:3])}",
                            hint="copy or download it again")
    if quantize:
        return model
    model = model.to("cpu" if sharded() else device())  # type: ignore[arg-type]  # FSDP moves its share only
    return model if on is None else _fold(model, on).to(getattr(torch, dtype))


def check_quantize(quantize: str | None) -> None:
    """ResourceError where the package that quantises is not there."""
    if quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(f"quantize: {quantize} needs bitsandbytes", hint="pip install 'paft[quant]'")


def _quantized(quantize: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise; such a model cannot be moved, so it is loaded in its place."""
    check_quantize(quantize)
    if quantize is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    kind = torch.bfloat16 if device() == "cuda" else torch.float32
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=kind)
    return {"quantization_config": config, "device_map": {"": device()}}


def _fold(model: Any, on: str) -> PreTrainedModel:
    """PEFT's `merge_and_unload`, refused where it computes something else than the adapter: on tied embeddings."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    wrapped = wrap(model, on)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # as PEFT has wrapped them in place
    tokens = {id(each.token_adapter.trainable_tokens_delta) if hasattr(each, "token_adapter") else 0 for each in ends}
    if tied and (len(tokens) > 1 or any(hasattr(each, "lora_A") for each in ends)):
        raise MismatchError(f"{on} changes the embedding or the head, which are tied: folded in, it would change both",
                            hint="start from an adapter without them, or untie the base first")
    try:
        return wrapped.merge_and_unload()
    except (RuntimeError, ValueError) as error:  # a LoRA bias on a layer that has none, an activated LoRA
        raise MismatchError(f"{on} cannot be folded into its base: {_first_line(error)}") from error


def skeleton(path: Path) -> PreTrainedModel:
    """The model of a directory's config without storage (meta device): for shapes and names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def parameters(path: Path) -> int:
    """Number of parameters of the model in ``path``."""
    return sum(parameter.numel() for parameter in skeleton(path).parameters())


def wrap(model: PreTrainedModel, adapter: str | Path) -> Any:
    """``model`` with a trained adapter on it, frozen: plain `PeftModel.from_pretrained`."""
    from peft import PeftModel
    from safetensors import SafetensorError

    path = hub.resolve(str(adapter), kind="adapter")
    if not (path / "adapter_config.json").is_file():
        raise NotFoundError(f"{adapter} is no adapter: it has no adapter_config.json")
    try:
        with warnings.catch_warnings():  # PEFT leaves what the file lacks at its random start, with a warning
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(path))
    except (SafetensorError, RuntimeError, ValueError, OSError, UserWarning) as error:
        raise MismatchError(f"{adapter} does not fit this base: {_first_line(error)}") from error


def linear_names(model: Module) -> list[str]:
    """Suffixes of the modules that ``all-linear`` would target, for messages."""
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, linear)}
    return sorted(names - {"lm_head"})


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0])[:200] if lines else type(error).__name__
