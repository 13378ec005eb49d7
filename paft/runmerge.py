"""The merges of a run: each from its adapters or their controls, made again only where what it depends on has changed."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

from paft import provenance
from paft.controls import pruned, rescaled
from paft.merge.engine import merge
from paft.progress import Progress
from paft.recipe import RunMerge
from paft.runjob import Run, key_of


def merge_all(job: Run) -> None:
    """Every merge of the recipe under ``merges/``; merges.json has the key of what each was made from."""
    recipe, store = job.recipe, job.out / "merges.json"
    keys = json.loads(store.read_text()) if store.is_file() else {}
    controlled = cache(partial(_controlled, job))  # several merges take the same control
    with Progress("merge", len(recipe.merge), quiet=job.quiet) as show:
        for done, (name, entry) in enumerate(recipe.merge.items(), 1):
            sources = [controlled(entry.of[0], entry.density_like, entry.norm_like), *map(job.adapter, entry.of[1:])]
            if not (keys.get(name) == (key := _key(job, entry, sources)) and job.merged(name).is_dir()
                    and not provenance.verify(job.merged(name))):
                merge([str(source) for source in sources], base=recipe.model, method=entry.method, parameters=entry.parameters,
                      weights=entry.weights, out=job.merged(name), dtype=recipe.merge_dtype, seed=recipe.seed, overwrite=True)
                keys[name] = key
                store.write_text(json.dumps(keys, indent=1))
            show(done, name)


def _key(job: Run, entry: RunMerge, sources: list[Path]) -> str:
    return key_of([entry.method, entry.parameters, entry.weights, job.recipe.merge_dtype, job.recipe.seed, job.base_hash],
                  *map(provenance.content_hash, sources))


def _controlled(job: Run, name: str, density_like: str | None, norm_like: str | None) -> Path:
    """The first adapter of a merge: pruned to the density of another, then brought to the norm of another, as far as asked."""
    adapter, folder = job.adapter(name), job.out / "rescaled"
    if density_like:
        adapter = pruned(adapter, job.adapter(density_like), folder, base=job.recipe.model)
    return rescaled(adapter, job.adapter(norm_like), folder, base=job.recipe.model) if norm_like else adapter
