"""Does a merged model work: plain transformers loads it, and its logits on a short input are finite numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paft.errors import MismatchError, NotFoundError, PaftError
from paft.progress import say
from paft.provenance import tensor_files

SMALL = 1e9  # bytes of weights up to which a merge is checked unasked: some seconds
_TOKENS = 8


def check_model(directory: Path, check: bool | None) -> dict[str, Any] | None:
    """Load ``directory`` on the default device and run `_TOKENS` tokens through it; returns what was found.

    ``check`` None: only a model below `SMALL`, and one that transformers cannot load at all is a note (its architecture may need
    code of its own). Raises MismatchError where the logits hold NaN or infinity, by the name of the first weight that does.
    """
    size = sum(file.stat().st_size for file in tensor_files(directory))
    if check is False or (check is None and size > SMALL):
        return None
    import torch

    from paft.models import load_model, quiet_libraries

    quiet_libraries()
    try:
        model = load_model(str(directory), finite=False)  # of which more is said below
    except (MismatchError, NotFoundError) as error:
        why = error.message.replace(str(directory), "the merged model")
        if check:
            raise MismatchError(f"the merged model does not load: {why}", hint="nothing was kept; --no-check keeps it") from error
        say(f"note: not checked that the merged model works: {why}")
        return None
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise _broken(f"{name} of the merged model holds NaN or infinity")
    tokens = torch.arange(_TOKENS, device=model.device) % int(model.config.get_text_config().vocab_size)
    with torch.inference_mode():
        logits = model(input_ids=tokens[None]).logits
    if not torch.isfinite(logits).all():
        raise _broken("all weights of the merged model are finite, and its logits are not")
    return {"loads": True, "finite_logits": True}


def _broken(said: str) -> PaftError:
    return MismatchError(said, hint="look for NaN in base and adapters, or a dtype that overflows; --no-check keeps it")
