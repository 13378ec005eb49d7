"""One writer for all reports: rows of plain values become a terminal table, Markdown or JSON.

A report is a list of dicts and a list of `Column`; a value that is missing, None or NaN shows as "-". Loads rich,
never torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
MISSING = "-"
WIDTH = 80
_GAP = 2
_FOLD = 16


@dataclass(frozen=True)
class Column:
    """One column of a report.

    ``key`` in the rows; ``header``; ``format``, a format spec such as ".3f" for numbers; ``help`` for the legend;
    ``spread``, the key of a deviation in the same unit, shown as "0.962 ± 0.011".
    """

    key: str
    header: str
    format: str = ""
    help: str = ""
    spread: str = ""

    def show(self, row: Row) -> str:
        """The cell as text; ``format`` is for numbers only, a word in a column of numbers is shown as it is."""
        cell = self._one(row.get(self.key))
        spread = self._one(row.get(self.spread)) if self.spread else MISSING
        return cell if MISSING in (cell, spread) else f"{cell} ± {spread}"

    def _one(self, value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return MISSING
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format(value, self.format) if isinstance(value, int | float) else str(value)

    def is_number(self, rows: Sequence[Row]) -> bool:
        """Whether the cells align right: all that are there are numbers, and there is one."""
        values = [value for row in rows if (value := row.get(self.key)) is not None]
        return bool(values) and all(isinstance(value, int | float) for value in values)


def table(rows: Sequence[Row], columns: Sequence[Column], title: str | None = None, *, width: int = WIDTH) -> Table:
    """A rich table of at most ``width`` cells: numbers stay whole and align right, words wrap.

    Headers wrap at spaces. Text is shown as it is: square brackets are no markup. Where the numbers alone are wider
    than ``width``, use `print_table`, which stacks several tables.
    """
    grid = Table(
        box=box.SIMPLE_HEAD,
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column, cells in zip(columns, _widths(rows, columns, width), strict=True):
        justify = "right" if column.is_number(rows) else "left"
        grid.add_column(Text(column.header), justify=justify, overflow="fold", width=cells)
    for row in rows:
        grid.add_row(*(Text(column.show(row)) for column in columns))
    return grid


def print_table(
    console: Console, rows: Sequence[Row], columns: Sequence[Column], title: str | None = None, *, legend: bool = False
) -> None:
    """Print rows within the console's width.

    Columns that do not fit go to a further table below, which repeats the first column. ``legend`` adds one line for
    each column that has a help text.
    """
    for part, shown in enumerate(_stacks(rows, columns, console.width)):
        console.print(table(rows, shown, title if part == 0 else None, width=console.width))
        console.print()
    if legend and any(column.help for column in columns):
        grid = Table.grid(padding=(0, 2, 0, 0))
        for column in columns:
            if column.help:
                grid.add_row(Text(column.header, "bold", no_wrap=True), Text(column.help))
        console.print(grid)


def to_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A GitHub table; numbers align right, pipes and line breaks inside a cell are escaped."""
    head = [escape(column.header) for column in columns]
    rule = ["---:" if column.is_number(rows) else "---" for column in columns]
    body = [[escape(column.show(row)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body]) + "\n"


def escape(text: str) -> str:
    """Text inside Markdown: no markup, no line break, no cell's end."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _cells(rows: Sequence[Row], column: Column) -> int:
    """Width of the widest cell."""
    return max((cell_len(column.show(row)) for row in rows), default=0)


def _least_width(rows: Sequence[Row], column: Column) -> int:
    """What a column needs: its longest number and the longest word of its header; long text may fold at 16 cells."""
    cells = _cells(rows, column)
    words = max(cell_len(word) for word in column.header.split() or [""])
    return max(words, cells if column.is_number(rows) else min(cells, _FOLD))


def _widths(rows: Sequence[Row], columns: Sequence[Column], width: int) -> list[int]:
    """Width of each column: what it needs, then what is left goes to the cells from left to right, then to the headers.

    rich's own shrinking takes from the widest column first and cuts numbers.
    """
    widths = [_least_width(rows, column) for column in columns]
    left = width - sum(widths) - _GAP * (len(columns) - 1)
    for wanted in ([_cells(rows, column) for column in columns], [cell_len(column.header) for column in columns]):
        for index, cells in enumerate(wanted):
            more = min(max(cells - widths[index], 0), max(left, 0))
            widths[index] += more
            left -= more
    return widths


def _stacks(rows: Sequence[Row], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Split columns into tables that fit, each beginning with the first column."""
    first, *rest = columns
    start = _least_width(rows, first)
    stacks, used = [[first]], start
    for column in rest:
        need = _GAP + _least_width(rows, column)
        if used + need > width and len(stacks[-1]) > 1:
            stacks.append([first])
            used = start
        stacks[-1].append(column)
        used += need
    return stacks
