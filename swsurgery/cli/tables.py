"""Lay out tables as lines of text, and fit them to the width of a terminal without leaving out a cell.

Pure functions from cells to lines. This module must not print anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from swsurgery.errors import escape_control

COLUMN_GAP = "  "
"""Text between two columns."""

INDENT = "    "
"""Text before the continuation of a row that is wider than the terminal."""

Row = Sequence[str]


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> list[str]:
    """Return the lines of a table, with columns of numbers aligned to the right.

    If the table is wider than `width` characters, a column whose cells are all equal is written once above the table,
    the widest column first. A table with one row then becomes one line for each column. If the rest is still too wide,
    a row continues on indented lines. A cell is never cut, so a line with a long name can exceed `width`. Control
    characters are escaped.
    """
    names = [escape_control(name) for name in header]
    cells = [[escape_control(str(cell)) for cell in row] for row in rows]
    columns = list(range(len(names)))
    if width is None or _measure_line(columns, names, cells) <= width:
        return _format_lines([columns], names, cells)
    if len(cells) == 1:
        return _list_pairs([n for n in columns if cells[0][n]], names, cells[0])
    shared = [n for n in columns if names[n] and cells and all(row[n] == cells[0][n] for row in cells)]
    hoisted: list[int] = []
    for number in sorted(shared, key=lambda n: -_measure_column(n, names, cells)):
        if len(columns) > 1 and _measure_line(columns, names, cells) > width:
            columns.remove(number)
            hoisted.append(number)
    above = _list_pairs(sorted(hoisted), names, cells[0]) + [""] if hoisted else []
    return above + _format_lines(_divide(columns, names, cells, width), names, cells)


def _measure_column(number: int, names: Row, cells: Sequence[Row]) -> int:
    return max(len(row[number]) for row in (names, *cells))


def _measure_line(columns: Sequence[int], names: Row, cells: Sequence[Row]) -> int:
    return sum(_measure_column(n, names, cells) for n in columns) + len(COLUMN_GAP) * (len(columns) - 1)


def _divide(columns: Sequence[int], names: Row, cells: Sequence[Row], width: int) -> list[list[int]]:
    """Divide the columns into groups that fit into lines of `width`. All lines but the first are indented."""
    groups: list[list[int]] = [[]]
    for number in columns:
        room = width - (len(INDENT) if len(groups) > 1 else 0)
        if groups[-1] and _measure_line([*groups[-1], number], names, cells) > room:
            groups.append([])
        groups[-1].append(number)
    return groups


def _format_lines(groups: Sequence[Sequence[int]], names: Row, cells: Sequence[Row]) -> list[str]:
    """Return the lines of the header and of each row. Each group of columns is one line."""
    widths = {n: _measure_column(n, names, cells) for group in groups for n in group}
    numeric = {n for n in widths if all(_is_number(row[n]) for row in cells)}
    lines = []
    for row in (names, *cells):
        for at, group in enumerate(groups):
            line = COLUMN_GAP.join(row[n].rjust(widths[n]) if n in numeric else row[n].ljust(widths[n]) for n in group)
            lines.append(((INDENT if at else "") + line).rstrip())
    return [line for line in lines if line or len(groups) == 1]


def _list_pairs(columns: Sequence[int], names: Row, row: Row) -> list[str]:
    """Return one line for each column: its name and the cell."""
    longest = max((len(names[n]) for n in columns), default=0)
    return [f"{names[n]:{longest}}{COLUMN_GAP}{row[n]}".rstrip() for n in columns]


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
