"""One run in one directory: its recipe, its rows, where each stage lies, and whether a training there is the recipe's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paft import data, provenance
from paft.executor import LOCAL, Ask, Executor
from paft.models import resolve_base
from paft.progress import say
from paft.recipe import DpoRecipe, RunRecipe
from paft.runplan import stage_recipe
from paft.sections import Resources
from paft.store import Store
from paft.train.reference import named_hash
from paft.train.work import PLACES

Rows = dict[str, list[data.Row]]
ON_THE_WAY = 128  # held-out rows of each kind that joint trainings are measured on as they go


@dataclass
class Run:
    """One run in one directory: its recipe, its rows, and what it has measured so far."""

    recipe: RunRecipe
    out: Path
    quiet: bool = False
    sft: Rows = field(default_factory=dict)
    pref: Rows = field(default_factory=dict)
    text: list[data.Row] = field(default_factory=list)
    base_hash: str = ""
    workers: int = 1  # 0: as many as the executor has room for
    share_base: bool = False
    resume: bool = False
    executor: Executor = LOCAL
    store: Store | None = None  # of a run behind a URL; ``out`` is then its directory on this machine

    @property
    def room(self) -> Path | Store:
        """Where every stage finds the run."""
        return self.store or self.out

    def adapter(self, name: str) -> Path:
        return self.out / "adapters" / name

    def merged(self, name: str) -> Path:
        return self.out / "merges" / name

    def ask(self, said: Resources | None = None) -> Ask:
        """What a stage asks of its node: by default enough for the base, and what its ``resources`` say."""
        return replace(self.executor.ask(base_size(self.recipe)), **(said.model_dump(exclude_none=True) if said else {}))

    def asks(self, trainings: Iterable[str] = ()) -> dict[str, Ask]:
        """What these trainings ask for, and the evaluation, which is as a merge."""
        return {name: self.ask(self.recipe.train[name].resources) for name in trainings} | {"evaluate": self.ask()}

    def there(self) -> Run:
        """The run as a stage elsewhere sees it: alone, with a log of its own to write to."""
        return replace(self, quiet=False, workers=1, executor=LOCAL) if self.executor.spreads else self

    def candidates(self) -> dict[str, Path]:
        """Everything the table has a row for: the base, then every adapter, then every merged model."""
        return {"base": resolve_base(self.recipe.model), **{name: self.adapter(name) for name in self.recipe.train},
                **{name: self.merged(name) for name in self.recipe.merge}}

    def read(self) -> None:
        """The rows of every split, and the base's hash; what `paft.data.splits` raises."""
        recipe, spec = self.recipe, self.recipe.data
        how = data.Reading(on_bad_row=recipe.on_bad_row, seed=recipe.seed,
                           note=lambda line: say(f"note: {line}", quiet=self.quiet))
        self.sft, self.pref = data.splits(spec.sft, "sft", how=how), data.splits(spec.pref, "pref", how=how)
        if spec.text:
            self.text = data.load_rows(spec.text, "text", recipe.evaluate.split if spec.text.startswith("demo:") else None)
        self.base_hash = provenance.content_hash(resolve_base(recipe.model))

    def rows(self, objective: str) -> Rows:
        """What a stage trains on; of a joint one also what it is measured on, if a trajectory is wanted: never the test split."""
        if objective != "joint":
            return {"train": (self.pref if objective == "dpo" else self.sft)["train"], "eval": []}
        found, said = {"sft": self.sft["train"], "pref": self.pref["train"]}, self.recipe.evaluate
        if said.trajectory:
            few = min(said.rows or ON_THE_WAY, ON_THE_WAY)
            found |= {"sft_eval": self.sft["validation"][:few], "pref_eval": self.pref["validation"][:few]}
        return found

    def is_done(self, name: str) -> bool:
        """Whether the adapter of a stage stands there, made from the same recipe, base, data and predecessor."""
        manifest = provenance.read_manifest(self.adapter(name))
        if manifest is None:
            return False
        stage = stage_recipe(self.recipe, name, self.out)
        same = _portable(manifest["recipe"]) == _portable(json.loads(json.dumps(stage.model_dump())))
        rows = {kind: data.content_hash(found) for kind, found in self.rows(self.recipe.train[name].objective).items() if found}
        before = provenance.read_manifest(Path(stage.on)) if stage.on else None
        on = manifest["base"].get("on", {}).get("content_sha256")
        named = named_hash(stage) if isinstance(stage, DpoRecipe) else None
        same = same and named in (None, (manifest.get("reference") or {}).get("content_sha256"))
        return (same and manifest["inputs"] == rows and manifest["base"]["content_sha256"] == self.base_hash
                and on == (before or {}).get("content_sha256") and not provenance.verify(self.adapter(name)))


def _portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the paths that only say where things lie; their content is compared by hash."""
    return {key: value for key, value in recipe.items() if key not in PLACES}


def key_of(*content: Any) -> str:
    """sha256 of plain data: what is cached under it depends on nothing else."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def base_size(recipe: RunRecipe) -> int:
    """Bytes of the base's tensors."""
    return sum(file.stat().st_size for file in provenance.tensor_files(resolve_base(recipe.model)))
