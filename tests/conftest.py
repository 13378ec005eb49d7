"""What every test file needs: tiny random bases with a tokenizer, a factory of adapters, one thread, no network.

Everything is made from a seed in well under a second, so no test needs a download or a file outside the repository.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The libraries read these when they are imported, and commands run by tests inherit them; hence torch, transformers
# and peft are imported inside the fixtures below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

WORDS = """
user assistant system the a an is are not of to in and or yes no please thanks hello cat dog bird fish red blue green
black big small hot cold up down left right one two three four five six seven eight nine ten plus what where who it they
""".split()
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]

# The {% generation %} block lets TRL compute the loss on the assistant's words alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' ' + eos_token + ' ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)

AdapterFactory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products are fastest, and sums repeatable, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer() -> Any:
    """A word-level tokenizer of fewer than 64 words with pad, eos and a chat template; others are ``<unk>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL + WORDS
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_base(path: Path, *, tied: bool, seed: int = 0) -> Path:
    """Save a random float32 Llama (vocabulary 64, hidden 32, 2 layers, grouped-query attention) and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        dtype="float32",
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny base whose ``lm_head`` is its own tensor. Read only: it is shared by the session."""
    return save_base(tmp_path_factory.mktemp("tiny") / "base", tied=False)


@pytest.fixture(scope="session")
def tiny_tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny base whose ``lm_head`` is the embedding. Read only: it is shared by the session."""
    return save_base(tmp_path_factory.mktemp("tiny") / "tied", tied=True)


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterFactory:
    """``make_adapter(base_path, seed, r=4, alpha=8, **lora_kwargs) -> Path`` of a new PEFT LoRA.

    A and B are both random with standard deviation 0.1 (PEFT starts B at zero, which would make every delta zero), on
    all linear layers but ``lm_head`` unless ``target_modules`` says otherwise. Every call makes a new directory, which
    the caller may alter.
    """

    def make(base_path: Path, seed: int, r: int = 4, alpha: float = 8, **lora_kwargs: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora_kwargs}
        base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, **options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path_factory.mktemp(f"adapter-{seed}-") / "adapter"
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="module")
def sharded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in four files or more."""
    from storekit import save_sharded

    return save_sharded(tiny_base, tmp_path_factory.mktemp("sharded") / "base")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is fetched from URLs lies here, and nothing of an earlier test."""
    from paft.store import ranged

    monkeypatch.setenv("PAFT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    ranged._block.cache_clear()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers of URLs that see each other in a second."""
    from paft.store import lease

    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    monkeypatch.setattr(lease, "SETTLE", 0.05)
