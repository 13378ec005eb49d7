"""One base in memory for many candidates: what is attached to it comes off without a trace."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AdapterFactory
from variantkit import make

from paft.candidates import attached
from paft.models import load_model, wrap

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
    "bias": {"target_modules": ["q_proj"], "lora_bias": False, "use_rslora": True},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_comes_off_without_a_trace(variant: str, tiny_base: Path, tmp_path: Path) -> None:
    adapter = make(tiny_base, tmp_path / "a", **VARIANTS[variant])
    model = load_model(str(tiny_base))
    before, modules = {name: one.clone() for name, one in model.state_dict().items()}, dict(model.named_modules())
    first, alone = logits(model), logits(wrap(load_model(str(tiny_base)), adapter))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Already found a `peft_config`")
        for _ in range(2):
            with attached(model, str(adapter)) as one:
                assert torch.equal(logits(one), alone) and not torch.equal(alone, first)
            after = model.state_dict()
            assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
            assert dict(model.named_modules()) == modules and torch.equal(logits(model), first)


def test_also_when_scoring_fails(tiny_base: Path, make_adapter: AdapterFactory) -> None:
    model = load_model(str(tiny_base))
    first = logits(model)
    with pytest.raises(RuntimeError), attached(model, str(make_adapter(tiny_base, 1))):
        raise RuntimeError
    assert torch.equal(logits(model), first)
