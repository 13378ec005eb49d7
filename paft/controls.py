"""Controls for a merge with a sparse adapter: the dense one at the sparse one's norm, its density, or both."""

from __future__ import annotations

from pathlib import Path

from paft import provenance
from paft.adapter import concatenate, read_adapter, save_adapter
from paft.merge.deltafile import is_delta
from paft.merge.engine import merge
from paft.merge.extract import Prune, extract
from paft.report.sources import open_source
from paft.report.sparsity import sparsity


def pruned(adapter: Path, like: Path, folder: Path, *, base: str) -> Path:
    """The delta of ``adapter`` with as many of each tensor's entries, the largest, as ``like`` has of at least 1e-5."""
    kept = max(1e-6, 1.0 - sparsity(read_adapter(like)).overall.moments.share_scaled)
    target = folder / f"{adapter.name}-pruned-as-{like.name}"
    extract(str(adapter), out=target, base=base, prune=Prune(kept, None), overwrite=True)
    return target


def rescaled(adapter: Path, like: Path, folder: Path, *, base: str) -> Path:
    """``adapter``, or a delta that was pruned, times the number that gives it the Frobenius norm of ``like``."""
    sources = [open_source(str(one), base if is_delta(one) else None) for one in (like, adapter)]
    norms = [sparsity(source).overall.moments.frobenius for source in sources]
    factor = norms[0] / norms[1] if norms[1] else 0.0
    target = folder / f"{adapter.name}-as-{like.name}"
    if is_delta(adapter):
        merge([str(adapter)], base=base, method="task_arithmetic", parameters={}, weights=[factor], out=target,
              output_kind="delta", overwrite=True)
        return target
    with provenance.output_dir(target, overwrite=True) as directory:
        config, tensors = concatenate([read_adapter(adapter)], [factor])
        save_adapter(directory, config, tensors)
        provenance.write_manifest(directory, command="run", seed=None,
                                  recipe={"of": adapter.name, "norm_like": like.name, "factor": factor})
    return target
