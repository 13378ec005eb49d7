"""Controls for a merge with a sparse adapter: the dense one at the sparse one's norm, or at its density."""

from __future__ import annotations

from pathlib import Path

from paft import provenance
from paft.adapter import concatenate, read_adapter, save_adapter
from paft.merge.extract import Prune, extract
from paft.report.sparsity import sparsity


def pruned(adapter: Path, like: Path, folder: Path, *, base: str) -> Path:
    """The delta of ``adapter`` with as many of each tensor's entries, the largest, as ``like`` has of at least 1e-5."""
    kept = max(1e-6, 1.0 - sparsity(read_adapter(like)).overall.moments.share_scaled)
    target = folder / f"{adapter.name}-pruned-as-{like.name}"
    extract(str(adapter), out=target, base=base, prune=Prune(kept, None), overwrite=True)
    return target


def rescaled(adapter: Path, like: Path, folder: Path) -> Path:
    """``adapter`` times the number that gives it the Frobenius norm of ``like``, as an adapter of its own."""
    norms = [sparsity(read_adapter(one)).overall.moments.frobenius for one in (like, adapter)]
    factor = norms[0] / norms[1] if norms[1] else 0.0
    target = folder / f"{adapter.name}-as-{like.name}"
    with provenance.output_dir(target, overwrite=True) as directory:
        config, tensors = concatenate([read_adapter(adapter)], [factor])
        save_adapter(directory, config, tensors)
        provenance.write_manifest(directory, command="run", seed=None,
                                  recipe={"of": adapter.name, "norm_like": like.name, "factor": factor})
    return target
