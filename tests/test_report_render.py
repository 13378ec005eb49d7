"""Tables that fit, Markdown and JSON that parse, figures whose labels do not collide."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from paft.errors import UsageError
from paft.provenance import to_json
from paft.report.labels import Box, place
from paft.report.render import Column, print_table, table, to_markdown

METRICS = ["exact match", "preference accuracy", "opener", "true fact", "cross-entropy on text", "SFT loss", "seconds"]
NAMES = ["base", "SFT → DPO (sequential)", "TIES, density 0.5, in mergekit's dialect, of SFT and DPO", "[red]x[/red]"]
COLUMNS = [Column("row", "row"), *(Column(name, name, ".3f", f"what {name} is") for name in METRICS)]
ROWS = [{"row": name} | {key: (i + 1) * (j + 1) / 7 for j, key in enumerate(METRICS)} for i, name in enumerate(NAMES)]


def printed(width: int, columns: list[Column] = COLUMNS, **options: bool) -> str:
    out = io.StringIO()
    print_table(Console(file=out, width=width), ROWS, columns, "Head to head", **options)
    return out.getvalue()


@pytest.mark.parametrize("width", [50, 80, 120, 300])
def test_every_number_is_whole_at_every_width(width: int) -> None:
    text = printed(width, legend=True)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    for row in ROWS:
        for column in COLUMNS[1:]:
            assert re.search(rf"(?<![\d.]){re.escape(column.show(row))}(?!\d)", text)
    joined = re.sub(r"[^\w\[\]/]", "", text)
    assert all(name in joined for name in ("base", "[red]x[/red]"))
    assert "what SFT loss is" in text


def test_a_wide_table_is_stacked_and_a_narrow_one_is_not() -> None:
    assert printed(80).count("base") > 1
    assert printed(300).count("base") == 1


def test_no_escape_codes_outside_a_terminal_nor_colour_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in printed(80)
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True).print(table(ROWS, COLUMNS[:3], "Head to head"))
    assert not re.search(r"\x1b\[[\d;]*(3[0-7]|38)[;m]", out.getvalue())


@pytest.mark.parametrize("row, shown", [
    ({"v": 0.5}, "0.500"), ({"v": None}, "-"), ({}, "-"), ({"v": math.nan}, "-"), ({"v": "n/a"}, "n/a"),
    ({"v": True}, "yes"), ({"v": 0.5, "sd": 0.25}, "0.500 ± 0.250"), ({"v": 0.5, "sd": None}, "0.500"),
])  # fmt: skip
def test_cells(row: dict, shown: str) -> None:
    assert Column("v", "value", ".3f", spread="sd").show(row) == shown


def test_markdown_has_one_line_a_row_whatever_is_in_the_cells() -> None:
    rows = [{"name": "a|b\nc <script>", "x": 1.0}, {"name": "d", "x": None}]
    lines = to_markdown(rows, [Column("name", "name"), Column("x", "x", ".1f")]).splitlines()
    assert lines == ["| name | x |", "| --- | ---: |", "| a\\|b c &lt;script> | 1.0 |", "| d | - |"]


def test_json_is_strict() -> None:
    text = to_json({"a": [math.nan, math.inf, 1.5], "ü": (1, None)})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "ü": [1, None]}


def test_an_empty_report_has_its_header() -> None:
    assert to_markdown([], COLUMNS[:2]).startswith("| row | exact match |")
    Console(file=io.StringIO()).print(table([], COLUMNS))


def test_render_loads_no_torch_and_only_plots_loads_matplotlib() -> None:
    code = ("import sys, paft.report.render; assert 'torch' not in sys.modules; import paft.report.sparsity_tables; "
            "assert 'matplotlib' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


def test_labels_of_separate_points_hide_nothing() -> None:
    points = [(40.0 + 30 * (i % 4), 40.0 + 25 * (i // 4)) for i in range(12)]
    sizes = [(50.0, 10.0)] * 12
    edge = Box(0, 0, 400, 300)
    spots = place(points, sizes, edge)
    boxes = [Box(x + s.dx, y + s.dy, x + s.dx + 50, y + s.dy + 10) for (x, y), s in zip(points, spots, strict=True)]
    hidden = sum(one.overlap(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert hidden < 0.02 * sum(box.area for box in boxes)
    assert all(edge.overlap(box) == pytest.approx(box.area) for box in boxes)
    assert spots == place(points, sizes, edge)


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_figures_in_every_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    import torch
    from test_report_sparsity import block_sparse, gaussian, report

    from paft.report.plots import sparsity_figure, tradeoff_figure

    torch.set_num_threads(1)
    reports = [report(gaussian, 2e-5), report(block_sparse, 1e-3)]
    first = sparsity_figure(reports, tmp_path / f"sparsity{suffix}")
    odd = "<b> $x$ \\frac"  # markup of several kinds is plain text in a label
    points = [
        {"name": f"_run {i} {odd}", "x": i % 3, "y": i / 4, "kind": f"_{i % 2} {odd}", "sd": 0.1} for i in range(9)
    ]
    points.append({"name": "not measured", "x": None, "y": 1.0})
    second = tradeoff_figure(points, tmp_path / "new" / f"tradeoff{suffix}", x="x", y="y", groups="kind", xerr="sd")
    for path in (first, second):
        assert path.read_bytes().startswith(magic)
    assert tradeoff_figure([], tmp_path / f"empty{suffix}", x="x", y="y").exists()
    assert sparsity_figure([], tmp_path / f"none{suffix}").exists()


def test_an_unknown_figure_format_is_refused(tmp_path: Path) -> None:
    from paft.report.plots import sparsity_figure

    with pytest.raises(UsageError, match=r"figure\.xyz"):
        sparsity_figure([], tmp_path / "figure.xyz")
