"""The README's table: `paft compare compare --seeds 5`, every way to combine SFT and preference data in the embedded world.

    python benchmarks/compare_table.py [-o DIR] [--seeds 5]

Finished stages are kept, so a study that was stopped continues. Writes benchmarks/compare.md, .json, .png and -ways.png as
`paft compare` does, and rows and columns of them between the README's <!-- table --> marks.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from paft.models import quiet_libraries

quiet_libraries()

from paft.catalog import find  # noqa: E402 - threads are set before torch loads
from paft.compare import run_seeds, write  # noqa: E402
from paft.recipe import RunRecipe, load  # noqa: E402
from paft.report.render import Column, to_markdown  # noqa: E402
from paft.report.seeds import study  # noqa: E402
from paft.report.seeds_tables import interval  # noqa: E402

HERE = Path(__file__).parent
SHORT = """base sft sft-l1 sft-prox dpo sft-dpo dpo-sft dpo-sft-l1 sft-l1-dpo mix alright maxright uft dpo-sft-term orpo
    linear task_arithmetic ties slerp dare_linear dare_ties task_arithmetic-l1 slerp-l1 ties-l1 task_arithmetic-prox
    task_arithmetic-pruned task_arithmetic-shrunk task_arithmetic-l2""".split()
COLUMNS = [Column("exact_match", "exact", ".2f"), Column("sft_loss", "SFT loss", ".2f"), Column("dpo_loss", "DPO loss", ".2f"),
           Column("pref_accuracy", "pref acc", ".2f"), Column("forgetting", "forgetting", ".2f"),
           Column("ideal", "ideal dist", ".2f")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "out" / "compare")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    found = study(run_seeds(load(RunRecipe, find("compare")), options.out, options.seeds))
    data = write(found, options.out)
    for name in ("compare.md", "compare.json", "compare.png", "compare-ways.png"):
        shutil.copyfile(options.out / name, HERE / name)
    by_id: dict[str, dict[str, Any]] = {row["id"]: row for row in data["rows"]}
    rows = [{**by_id[name], **{f"vs {base}": interval(vs["ideal"]) for base, vs in by_id[name]["vs"].items() if "ideal" in vs}}
            for name in SHORT]
    against = [Column(f"vs {base}", f"ideal dist - that of {by_id[row]['name']}") for base, row in data["baselines"].items()]
    columns = [Column("name", "model"), *(Column(c.key, c.header, c.format, "", f"{c.key}_se") for c in COLUMNS), *against[:1]]
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->")
    readme.write_text(f"{before}<!-- table -->\n{to_markdown(rows, columns)}<!-- /table -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
