"""The merges of a run: each from its adapters or their controls, made again only where what it depends on has changed."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

from paft import provenance
from paft.controls import pruned, rescaled
from paft.jsonfile import read_json
from paft.merge.engine import merge
from paft.progress import Progress
from paft.recipe import RunMerge
from paft.runjob import Run, key_of
from paft.runstore import ADAPTERS, CONTROLS, MERGES, publish, staged


def merge_all(job: Run) -> None:
    """Every merge of the recipe under ``merges/``; merges.json has the key of what each was made from."""
    recipe, store = job.recipe, job.out / "merges.json"
    keys = read_json(store) if store.is_file() else {}
    controlled = cache(partial(_controlled, job))  # several merges take the same control
    left: dict[str, tuple[list[Path], str]] = {}  # name -> (adapters, below the run's directory; key)
    for name, entry in recipe.merge.items():
        sources = [controlled(entry.of[0], entry.density_like, entry.norm_like), *map(job.adapter, entry.of[1:])]
        if not (keys.get(name) == (key := _key(job, entry, sources)) and job.merged(name).is_dir()
                and not provenance.verify(job.merged(name))):
            left[name] = [source.relative_to(job.out) for source in sources], key
    publish(job, CONTROLS)
    made: list[str] = []
    with Progress("merge", len(left), quiet=job.quiet or job.executor.spreads) as show:
        def done(name: str, _: None) -> None:
            made.append(name)
            keys[name] = left[name][1]
            provenance.write_whole(store, json.dumps(keys, indent=1))
            publish(job)
            show(len(made), name)

        work = staged(job, partial(_merge_one, left), ADAPTERS, CONTROLS, makes=MERGES)
        job.executor.graph(dict.fromkeys(left), work, workers=0 if job.executor.spreads else 1,
                           done=done, room=job.room, asks=dict.fromkeys(left, job.ask()))


def _merge_one(left: dict[str, tuple[list[Path], str]], job: Run, name: str) -> None:
    recipe, entry = job.recipe, job.recipe.merge[name]
    sources = [str(job.out / source) for source in left[name][0]]
    merge(sources, base=recipe.model, method=entry.method, parameters=entry.parameters, weights=entry.weights,
          out=job.merged(name), dtype=recipe.merge_dtype, seed=recipe.seed, overwrite=True)


def _key(job: Run, entry: RunMerge, sources: list[Path]) -> str:
    return key_of([entry.method, entry.parameters, entry.weights, job.recipe.merge_dtype, job.recipe.seed, job.base_hash],
                  *map(provenance.content_hash, sources))


def _controlled(job: Run, name: str, density_like: str | None, norm_like: str | None) -> Path:
    """The first adapter of a merge: pruned to the density of another, then brought to the norm of another, as far as asked."""
    adapter, folder = job.adapter(name), job.out / "rescaled"
    if density_like:
        adapter = pruned(adapter, job.adapter(density_like), folder, base=job.recipe.model)
    return rescaled(adapter, job.adapter(norm_like), folder, base=job.recipe.model) if norm_like else adapter
