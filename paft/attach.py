"""A stranger's adapter onto a model in memory, by PEFT, after a look at what PEFT takes on trust.

PEFT reads pickles, runs the patterns of a config with Python's ``re``, which a few characters keep busy for years, and passes
over NaN.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paft import hub
from paft.bounded import tried
from paft.errors import MismatchError, NotFoundError, first_line, is_out_of_memory
from paft.jsonfile import read_header, read_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_AGAIN = "copy or download it again"


def wrap(model: Any, adapter: str | Path) -> Any:
    """``model`` with a trained adapter on it, frozen: plain `PeftModel.from_pretrained`, of safetensors alone.

    Raises NotFoundError for what is no adapter, MismatchError for one that is damaged, hostile or of another base.
    """
    from peft import PeftModel

    path = hub.resolve(str(adapter), kind="adapter")
    if not (path / _CONFIG).is_file():
        raise NotFoundError(f"{adapter} is no adapter: it has no {_CONFIG}")
    if not (path / _WEIGHTS).is_file():
        if any(path.glob("*.bin")):
            raise MismatchError(f"{adapter} holds pickled weights only", hint="save the adapter again as safetensors")
        raise NotFoundError(f"{adapter} holds no {_WEIGHTS}")
    read_header(path / _WEIGHTS)
    _check_patterns(read_json(path / _CONFIG), [name for name, _ in model.named_modules()], adapter)
    try:
        with warnings.catch_warnings():  # PEFT leaves what the file lacks at its random start, with a warning
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(model, str(path))
    except Exception as error:  # of an odd config whatever the variants' code meets
        if is_out_of_memory(error):
            raise
        raise MismatchError(f"{adapter} does not fit this base: {first_line(error)}") from error
    check_finite(((key, weight) for key, weight in wrapped.named_parameters() if "default" in key.split(".")), str(adapter))
    return wrapped


def _check_patterns(config: Mapping[str, Any], names: list[str], adapter: str | Path) -> None:
    """MismatchError for a pattern that does not come to an end on the names of the model's modules."""
    said = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    sections = [config.get(key) for key in ("rank_pattern", "alpha_pattern")]
    keyed = [key for section in sections if isinstance(section, dict) for key in section]
    patterns = [each for each in (*said, *keyed) if isinstance(each, str) and not re.fullmatch(r"[\w.-]*", each)]

    def match() -> None:
        for pattern in patterns:
            for name in names:
                re.fullmatch(pattern, name)
                re.match(rf"(.*\.)?({pattern})$", name)

    if patterns and (why := tried(match)):
        raise MismatchError(f"a pattern in {_CONFIG} of {adapter} {why}", hint="correct it, if you trust the adapter")


def check_finite(parameters: Iterable[tuple[str, Any]], name: str) -> None:
    """MismatchError for NaN or infinity in a weight, by its name: a loss that is NaN would not tell where that comes from."""
    for key, weight in parameters:  # the sum is one pass without a copy; a sum that overflows is looked at again
        if weight.is_floating_point() and not weight.detach().sum().isfinite() and not weight.detach().isfinite().all():
            raise MismatchError(f"{key} of {name} holds NaN or infinity", hint=_AGAIN)
