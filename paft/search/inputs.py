"""What a search is given: adapters with held-out data, or a run, whose adapters and splits they then are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paft import data
from paft.catalog import catalog, find, kind_of
from paft.errors import NotFoundError, UsageError
from paft.evaluate import Held
from paft.provenance import MANIFEST, read_manifest
from paft.recipe import RunRecipe, load, validate
from paft.search.search import Plan
from paft.store import Bucket, Store, fetched, is_url

Rows = list[data.Row]


def run_of(name: str) -> tuple[RunRecipe, Path | Store] | None:
    """The run that ``name`` is, and where: a finished run's directory or URL, or a recipe (then merges/NAME)."""
    path = Path(name)
    if is_url(name):
        return _made(Store(name), fetched(name, [MANIFEST])) if Bucket(name).has(MANIFEST) else None
    if path.is_dir():
        return _made(path, path)
    if not (path.is_file() or name in catalog()) or kind_of(find(name)) != "run":
        return None
    recipe = load(RunRecipe, find(name))
    return recipe, Path("merges") / recipe.name


def _made(place: Path | Store, here: Path) -> tuple[RunRecipe, Path | Store] | None:
    """The run that is at ``place``, if it is one, by its manifest ``here``."""
    manifest = read_manifest(here)
    known = manifest is not None and manifest.get("recipe", {}).get("kind") == "run"
    return (validate(RunRecipe, manifest["recipe"]), place) if manifest and known else None


def plan_run(recipe: RunRecipe, place: Path | Store, stages: Sequence[str] | None, *, rows: int | None = None,
             batch_size: int | None = None, dtype: str = "float32") -> Plan:
    """Adapters of a run (``stages``; by default the first SFT and the first DPO stage trained from the base) on its own splits.

    Raises UsageError for a stage that the run does not have, NotFoundError for one that is not trained yet.
    """
    first = {stage.objective: name for name, stage in reversed(recipe.train.items()) if not stage.on}
    chosen = list(stages) if stages else [first[one] for one in ("sft", "dpo") if one in first]
    for name in chosen:
        if name not in recipe.train:
            raise UsageError(f"{recipe.name} trains no {name!r}", hint=f"it trains {', '.join(recipe.train)}")
        if not _is_trained(place, name):
            raise NotFoundError(f"{place / 'adapters' / name} is not there", hint=f"paft run {recipe.name} trains it")
    how = data.Reading(on_bad_row=recipe.on_bad_row, seed=recipe.seed)
    sft, pref = data.splits(recipe.data.sft, "sft", how=how), data.splits(recipe.data.pref, "pref", how=how)
    validation, test = (Held(sft[split], pref[split], []).head(rows) for split in ("validation", "test"))
    return Plan(tuple(str(place / "adapters" / name) for name in chosen), recipe.model, validation, test,
                recipe.defaults.dpo.beta, batch_size or recipe.evaluate.batch_size, recipe.chat_template, dtype)


def plan_adapters(adapters: Sequence[str], base: str | None, sft: str | None, pref: str | None, *, sft_test: str | None = None,
                  pref_test: str | None = None, beta: float = 0.1, rows: int | None = None, batch_size: int | None = None,
                  dtype: str = "float32") -> Plan:
    """Adapters on held-out data. Without test data half of the prompts of ``sft`` and ``pref``, by content, are the test rows."""
    if not sft or not pref:
        raise UsageError("both objectives need held-out data", hint="pass --sft-data and --pref-data")
    both = [_halves(sft, sft_test, "sft"), _halves(pref, pref_test, "pref")]
    validation, test = (Held(both[0][i], both[1][i], []).head(rows) for i in (0, 1))
    return Plan(tuple(adapters), base, validation, test, beta, batch_size or 16, None, dtype)


def _is_trained(place: Path | Store, name: str) -> bool:
    return f"adapters/{name}" in place.names() if isinstance(place, Store) else (place / "adapters" / name).is_dir()


def _halves(source: str, test: str | None, role: data.Role) -> tuple[Rows, Rows]:
    if test:
        return data.load_rows(source, role, "validation"), data.load_rows(test, role, "test")
    if source.startswith("demo:") and source.count(":") == 1:
        found = data.splits(source, role)
        return found["validation"], found["test"]
    return data.hold_out(data.load_rows(source, role, "validation"), 0.5, "test")
