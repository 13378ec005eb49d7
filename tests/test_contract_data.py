"""What `paft.train.rendering` and the streams take from TRL: private names, defaults, and what they read of their owner."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from paft.train.rendering import MAX_LENGTH

OWNER = {"_tokenizer", "chat_template", "completion_only_loss"}
ARGS = {"dataset_num_proc", "dataset_text_field", "max_length", "shuffle_dataset", "assistant_only_loss"}
# Read only in branches that `render` does not take: max_length is None and nothing is packed there.
ELSEWHERE = {"truncation_mode", "packing_strategy", "seed"}


def attributes(function: Any, name: str) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name}


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (SFTTrainer._prepare_dataset,
         ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]),
        (DPOTrainer._prepare_dataset, ["self", "dataset", "processing_class", "args", "dataset_name"]),
    ],
)
def test_preparation_needs_no_trainer(function: Any, names: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == names
    assert attributes(function, "self") <= OWNER, "render's owner must have it"
    assert attributes(function, "args") <= ARGS | ELSEWHERE, "render's args must have it"


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig])
def test_defaults_that_rendering_repeats(kind: Any) -> None:
    fields = kind.__dataclass_fields__
    assert fields["max_length"].default == MAX_LENGTH and fields["truncation_mode"].default == "keep_start"
    if kind is SFTConfig:
        assert fields["packing_strategy"].default == "bfd" and fields["dataset_text_field"].default == "text"
        assert fields["completion_only_loss"].default is None


def test_training_templates_are_chosen_as_the_trainer_does() -> None:
    source = inspect.getsource(SFTTrainer.__init__)
    assert "self.chat_template = get_training_chat_template(processing_class)" in source
    assert has_generation_markers("{% generation %}{% endgeneration %}") and callable(get_training_chat_template)
