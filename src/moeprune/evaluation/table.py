"""The table of results in a terminal or a pipe: a row per measure, a column per candidate."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeprune.evaluation.report import Report
from moeprune.evaluation.verdict import Cell, Tone, verdict

STYLES: dict[Tone, str] = {"better": "green", "worse": "red", "same": "dim"}
PIPE_WIDTH = 120  # columns; a pipe has no width of its own, and what reads it does not wrap


def table(report: Report, candidates: Sequence[int] | None = None) -> Table:
    """One table of the report; `candidates` are indices into report.candidates (default: all)."""
    shown = range(len(report.candidates)) if candidates is None else candidates
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    result.add_column("")
    for index in shown:
        # Names are the user's: Text keeps brackets in them from being read as markup.
        result.add_column(Text(report.candidates[index].name), justify="right", overflow="fold")
    for group in verdict(report):
        indent = ""
        if group.title:
            result.add_section()
            title = Text(group.title, style="bold cyan" if group.pruned_for else "bold")
            if group.pruned_for:
                title.append(" (pruned for)")
            result.add_row(title)
            indent = "  "
        changes = [max((len(row.cells[index].change) for row in group.rows), default=0) for index in shown]
        for row in group.rows:
            compared = any(cell.change for cell in row.cells)
            cells = (_cell(row.cells[index], compared * width) for index, width in zip(shown, changes, strict=True))
            result.add_row(Text(indent + row.label), *cells)
    return result


def show(report: Report, console: Console | None = None, width: int | None = None) -> None:
    """Print the table; where candidates do not fit side by side, several tables, each with the original in front.

    `width` in columns is by default the terminal's, or the console's but at least 120 where that is not a terminal.
    """
    console = console or Console()
    if width is None:
        bounded = console.is_terminal or "COLUMNS" in os.environ
        width = console.width if bounded else max(console.width, PIPE_WIDTH)
    for part in _parts(report, console, width):
        shown = table(report, part)
        # A table's own width holds where the console's would fold it, as that of a pipe would.
        shown.width = min(width, _width(shown, console))
        console.print(shown, crop=False)


def _cell(cell: Cell, change_width: int) -> Text:
    text = Text(cell.value)
    if change_width:
        text.append(f"  {cell.change:>{change_width}}", style=STYLES[cell.tone])
    return text


def _parts(report: Report, console: Console, width: int) -> list[list[int]]:
    parts = [[0]]
    for index in range(1, len(report.candidates)):
        wider = [*parts[-1], index]
        if len(parts[-1]) == 1 or _width(table(report, wider), console) <= width:
            parts[-1] = wider
        else:
            parts.append([0, index])
    return parts


def _width(shown: Table, console: Console) -> int:
    return console.measure(shown, options=console.options.update(width=100_000)).maximum
