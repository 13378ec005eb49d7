"""A report as one HTML page that needs nothing else: no network, no script; figures are inside, and every name is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from paft.report.interference import Interference
from paft.report.render import Column, Row
from paft.report.seeds import COMBINED, Study
from paft.report.seeds import Row as SeedsRow
from paft.report.sparsity import SparsityReport
from paft.report.trainings import Group

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h1, h2, p, li, summary { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top; white-space: nowrap; }
th { border-bottom-color: #333; vertical-align: bottom; max-width: 11rem; white-space: normal; overflow-wrap: break-word; }
td:first-child { position: sticky; left: 0; background: #fff; min-width: 8.5rem; max-width: 16rem; white-space: normal; }
.n { text-align: right; } td.in { padding-left: 1.6rem; }
.said li { margin: .4rem 0; } .note { color: #555; font-size: .875rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .875rem; } summary { cursor: pointer; padding: .4rem 0; }
@media screen { figure svg { min-width: 34rem; } }
@media (min-width: 50rem) { td:first-child { min-width: 11.5rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } figure, tr { break-inside: avoid; } .wide { overflow: visible; }
  figure svg { max-height: 12cm; }
}
"""
_LAYERS = ("The share below the threshold, by layer (Figure 2 of the PAFT paper). Dashed: what a Gaussian of the same rms would "
           "show. A share on its dashed line says how large the delta is, and nothing about sparsity.")
_PLACE = ("Rescaling moves a curve sideways without changing its shape; the threshold stands still. That is how a learning rate "
          "makes any share.")
_MAP = "Layer by module. The left side depends on the scale, the right side does not."
_WAYS = ("Each marker is an evaluation on held-out rows; the large one is the end, the star the ideal point. Below, the "
         "objective that each step has taken, and what it cost.")
_ENDS = ("Held-out losses, mean ± standard error over the seeds; dashed: the Pareto front of the means; star: the best of each. "
         "Of many points, those on the front and the nearest of each kind are named.")
_STAGES = ("Means over the seeds, each from the base to the large marker, which is the row of the table; grey: rows without a "
           "way; dashed: the front of the ends; star: the best of each objective. A sequence goes over its first stage's row.")
_MEASURED = (" Small markers on the way of a joint training are evaluations on some rows of the validation split; a dotted line "
             "leads to its row, which is measured on the {split} split.")
_COSTS = "A row costs what all trainings that it needs cost: wall time in sum, memory at most."
_CLASH = "By layer, beside what two unrelated updates of this size and rank would show (dashed)."


def sparsity_page(reports: Sequence[SparsityReport], path: Path, said: Sequence[str]) -> Path:
    """The sparsity reports as a page; ``said`` are its sentences."""
    from paft.report.maps import as_svg, histogram_figure, sparsity_map
    from paft.report.plots import layer_figure
    from paft.report.sparsity_tables import breakdown, summary, sweep

    parts = [_list(said), _section("Measures", _table(*summary(reports), legend=True)),
             _figure(as_svg(layer_figure(reports), "layers"), _LAYERS),
             _figure(as_svg(histogram_figure(reports), "place"), _PLACE)]
    for index, report in enumerate(reports):
        parts.append(_figure(as_svg(sparsity_map(report), f"map{index}"), _MAP))
    parts.append(_section("Other thresholds", _table(*sweep(reports))))
    for report in reports:
        for by in ("layer", "module", "tensor"):
            parts.append(_folded(f"{report.name}, by {by}", _table(*breakdown(report, by), legend=True)))
    return _write(path, _title("Sparsity", [report.name for report in reports]), parts)


def interference_page(found: Sequence[Interference], path: Path, said: Sequence[str]) -> Path:
    """The interference of some pairs as a page."""
    from paft.report.interference_tables import breakdown, summary
    from paft.report.maps import as_svg, clash_figure, interference_map

    parts = [_list(said), *(_section(" and ".join(pair.names), _table(*summary(pair))) for pair in found),
             _figure(as_svg(clash_figure(found), "clash"), _CLASH)]
    for index, pair in enumerate(found):
        parts.append(_figure(as_svg(interference_map(pair), f"map{index}"), "Layer by module."))
        for by in ("layer", "module", "tensor"):
            parts.append(_folded(f"{' and '.join(pair.names)}, by {by}", _table(*breakdown(pair, by), legend=True)))
    return _write(path, _title("Interference", [" and ".join(pair.names) for pair in found]), parts)


def _title(what: str, names: Sequence[str]) -> str:
    """With the names if they are two at most; the page has them below."""
    return f"{what} of {', '.join(names)}" if len(names) <= 2 else f"{what} of {names[0]} and {len(names) - 1} more"


def training_page(groups: Sequence[Group], path: Path, said: Sequence[str]) -> Path:
    """Compared trainings as a page; ``said`` are the sentences."""
    from paft.report.maps import as_svg
    from paft.report.training_tables import summary
    from paft.report.trajectory import training_figure

    parts = [_list(said), _section("Measures", _table(*summary(groups), legend=True)),
             _figure(as_svg(training_figure(groups), "trainings"), _WAYS)]
    return _write(path, f"Comparison of {', '.join(group.label for group in groups)}", parts)


def study_page(found: Study, rows: Sequence[SeedsRow], path: Path, said: Sequence[str]) -> Path:
    """A pipeline over several seeds as a page."""
    from paft.report.maps import as_svg
    from paft.report.seeds_tables import tables
    from paft.report.trajectory import cost_figure, study_figure, ways_figure
    from paft.report.ways import split_of, ways

    title = f"{found.recipe.get('name')}: {len(found.runs)} seeds"
    means, *differences = tables(found, rows)
    parts = [_list(said), _figure(as_svg(study_figure(rows, "Both objectives"), "front"), _ENDS),
             _section(means[0], _table(*means[1:], legend=True))]
    if gone := ways(found):
        told = "" if all(way.staged for way in gone) else _MEASURED.format(split=split_of(found))
        parts.insert(2, _figure(as_svg(ways_figure(rows, gone, "The ways there"), "ways"), _STAGES + told))
    if any(row["group"] in COMBINED for row in rows):
        parts.append(_figure(as_svg(cost_figure(rows), "costs"), _COSTS))
    parts += [_section(name, _table(shown, columns)) for name, shown, columns in differences]
    return _write(path, title, parts)


def _write(path: Path, title: str, parts: Sequence[str]) -> Path:
    import paft

    foot = f'<p class="note">Made by paft {escape(str(paft.__version__))}. Equations: the docstrings of paft.report.</p>'
    page = (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n<body>\n'
            f"<h1>{escape(title)}</h1>\n" + "\n".join([*parts, foot]) + "\n</body>\n</html>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _list(lines: Sequence[str]) -> str:
    return '<ul class="said">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _figure(svg: str, caption: str) -> str:
    return f'<figure><div class="wide">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _table(rows: Sequence[Row], columns: Sequence[Column], *, legend: bool = False) -> str:
    numbers = ["n" if column.is_number(rows) else "" for column in columns]

    def cell(tag: str, text: str, mark: str) -> str:
        mark = mark or "in" * text.startswith("  ")  # what a terminal shows as indented
        return f'<{tag} class="{mark}">{escape(text.strip())}</{tag}>' if mark else f"<{tag}>{escape(text)}</{tag}>"

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(tag, text, mark) for text, mark in zip(texts, numbers, strict=True)) + "</tr>"

    head = line("th", [column.header for column in columns])
    body = "".join(line("td", [column.show(row) for column in columns]) for row in rows)
    told = [f"{escape(column.header)}: {escape(column.help)}" for column in columns if column.help]
    note = f'<p class="note">{"; ".join(told)}.</p>' if legend and told else ""
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}'
