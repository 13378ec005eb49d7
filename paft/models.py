"""A base model and its tokenizer, checked for what later goes wrong silently: chat template, eos, pad."""

from __future__ import annotations

import importlib.util
import logging as stdlib_logging
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft import hub
from paft.attach import check_finite, wrap
from paft.data.template import LARGEST, check_template, choose_template
from paft.errors import MismatchError, NotFoundError, ResourceError, is_out_of_memory
from paft.jsonfile import LIMIT, read_header, read_json
from paft.preflight import check_memory
from paft.provenance import tensor_files

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LAYERS = 10_000  # at most, of a model without weights
_AGAIN = "copy or download it again"
VOCABULARY = 256_000_000  # bytes; the largest in use has 35 MB


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


def load_config(path: Path) -> Any:
    """transformers' config of a model directory; MismatchError for one that it cannot read, or that its weights belie.

    Code that comes with a model is never run.
    """
    from transformers import AutoConfig

    read_json(path / "config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    except Exception as error:  # validators and the classes of all architectures raise what they like
        raise _odd_config(path, error) from error
    held = sum(len(read_header(file)[0]) for file in tensor_files(path)) or LAYERS
    if isinstance(layers, int) and layers > held:
        raise MismatchError(f"the config of {path} says {layers} layers, and its files hold {held} tensors", hint=_AGAIN)
    return config


def _odd_config(path: Path, error: Exception) -> MismatchError:
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return MismatchError(f"{path} is of an architecture of its own, with code that paft does not run",
                             hint="choose a model that transformers knows by itself")
    return MismatchError(f"the config of {path} is none that transformers can use: {_said(error)}", hint=_AGAIN)


def _said(error: Exception) -> str:
    """The error's text on one line, with its type where that is half of it."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__} {text}".strip()


def check_sizes(path: Path) -> None:
    """MismatchError for a file of a tokenizer or a configuration that is too large to be one: it is read whole."""
    for file in path.iterdir():
        most = {".jinja": LARGEST, ".json": LIMIT, ".txt": LIMIT, ".model": LIMIT}.get(file.suffix)
        most = VOCABULARY if file.name in ("tokenizer.json", "vocab.json", "tokenizer.model") else most
        if most is not None and file.is_file() and file.stat().st_size > most:
            raise MismatchError(f"{file} is larger than {most / 1e6:.0f} MB", hint="no tokenizer or configuration is")


def load_tokenizer(name: str, *, chat: bool = True, template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token; MismatchError without a chat template when ``chat`` data needs one.

    ``template``: a shipped name or a file (`paft.data.template`), in place of the model's own.
    """
    from transformers import AutoTokenizer

    path = resolve_base(name)
    check_sizes(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise NotFoundError(f"{name} has no tokenizer that transformers can load: {_first_line(error)}") from error
    except Exception as error:  # of a file that is JSON, and none of a tokenizer's
        raise MismatchError(f"the tokenizer of {name} is damaged: {_said(error)}", hint=_AGAIN) from error
    if tokenizer.eos_token_id is None:
        raise MismatchError(f"the tokenizer of {name} has no eos token: a model trained with it would never stop",
                            hint="set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        # Labels are masked by position, not by id, so sharing eos with pad is safe here.
        tokenizer.pad_token = tokenizer.eos_token
    if template:
        choose_template(tokenizer, template)
    elif chat:
        check_template(tokenizer, name)
    if chat and not tokenizer.chat_template:
        raise MismatchError(f"{name} has no chat template, and the data is conversational",
                            hint="choose one, for example --chat-template zephyr, or use prompt / completion strings")
    tokenizer.padding_side = "right"
    return tokenizer


def check_load(*paths: Path, dtype: str = "float32", quantize: str | None = None) -> None:
    """ResourceError where the weights of these models do not fit together into the memory of the default device.

    A lower bound, from the headers of their files: activations come on top.
    """
    import torch

    width = 0.5 if quantize else getattr(torch, dtype).itemsize
    headers = [read_header(file)[0] for path in paths for file in tensor_files(path)]
    shapes = [entry["shape"] for header in headers for name, entry in header.items() if name != "__metadata__"]
    said, needed = f"to load {' and '.join(path.name for path in paths)}", width * sum(map(math.prod, shapes))
    if device() == "cpu":
        check_memory(said, needed, "choose a smaller base or dtype: bfloat16, or end other programs")
    elif (free := torch.cuda.mem_get_info()[0]) < needed:
        raise ResourceError(f"{said} takes {needed / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free",
                            hint="choose a smaller base, dtype: bfloat16 or quantize: 4bit; or CUDA_VISIBLE_DEVICES= for the CPU")


def load_model(name: str, *, on: str | None = None, dtype: str = "float32", quantize: str | None = None,
               finite: bool = True) -> PreTrainedModel:
    """The base in ``dtype`` on the default device; with ``on`` that adapter's ΔW is folded in, in float32.

    Its weights are looked at for NaN (``finite``). ``quantize="4bit"``: the linear layers as NF4, doubly quantised (QLoRA,
    arXiv 2305.14314), by bitsandbytes. Raises NotFoundError / MismatchError for what is missing or does not fit,
    ResourceError without bitsandbytes or the memory.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = resolve_base(name)
    load_config(path)
    check_load(path, dtype="float32" if on else dtype, quantize=quantize)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32" if on else dtype, use_safetensors=True,
                                                           output_loading_info=True, **_quantized(quantize))
    except (OSError, ValueError) as error:
        raise NotFoundError(f"cannot load {name}: {_first_line(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise MismatchError(f"cannot load {name}: {_first_line(error)}", hint=_AGAIN) from error
    except Exception as error:  # of an odd config: whatever the architecture's own code meets
        raise MismatchError(f"cannot load {name}: {_said(error)}", hint=_AGAIN) from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers would draw them at random and say so in a log that nobody reads.
        raise MismatchError(f"{name} lacks tensors that its config asks for: {', '.join(sorted(info['missing_keys'])[:3])}",
                            hint=_AGAIN)
    if finite:
        check_finite(model.named_parameters(), name)
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
    """The model of a directory's config without storage (meta device): for shapes and names; MismatchError for an odd config."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _odd_config(path, error) from error


def parameters(path: Path) -> int:
    """Number of parameters of the model in ``path``."""
    return sum(parameter.numel() for parameter in skeleton(path).parameters())


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
