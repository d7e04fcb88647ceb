"""Render the rows of a result as CSV, or as a table for LaTeX.

Pure functions from rows to text. A name may come from a hostile file, so control characters are escaped, a CSV cell is
never a formula, and a LaTeX cell contains no command. Sources: RFC 4180; the documentation of booktabs.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from swsurgery.errors import escape_control
from swsurgery.storage.numbers import NO_COMMAS, format_number

TableForm = Literal["csv", "latex"]

Rows = Iterable[Mapping[str, object]]


def render_table(form: TableForm, columns: Sequence[str], rows: Rows) -> str:
    """Render a table with a header, as text that ends with a newline."""
    return _RENDERERS[form](columns, [[row.get(column) for column in columns] for row in rows])


# CSV ----------------------------------------------------------------------------------------------------------------


def _render_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Render CSV with all digits of each number. An empty cell stands for None, and a list is written as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[_render_csv_cell(cell) for cell in row] for row in rows])
    return text.getvalue()


def _render_csv_cell(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        text = escape_control(cell)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) and text not in _NUMBER_WORDS else text
    return json.dumps(cell)  # NaN and infinities are texts in rows already


_NUMBER_WORDS = ("nan", "inf", "-inf")


# LaTeX --------------------------------------------------------------------------------------------------------------


def _render_latex(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Render a `tabular` with the rules of booktabs. Numbers have four significant digits."""
    numeric = [all(_is_number(row[at]) for row in rows) and bool(rows) for at in range(len(columns))]
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        "\\toprule",
        _join_cells(map(_escape_latex, columns)),
        "\\midrule",
        *(_join_cells(map(_render_latex_cell, row)) for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _join_cells(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _is_number(cell: object) -> bool:
    return cell is None or cell in _NUMBER_WORDS or (isinstance(cell, int | float) and not isinstance(cell, bool))


def _render_latex_cell(cell: object) -> str:
    if cell is None:
        return "--"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float) and math.isfinite(cell):
        return _render_latex_number(cell)
    if isinstance(cell, int):
        return f"${cell}$" if cell < 0 else str(cell)
    if isinstance(cell, float) or cell in _NUMBER_WORDS:
        return f"${str(cell).replace('inf', INFINITY).replace('nan', NOT_A_NUMBER)}$"
    return _escape_latex(cell if isinstance(cell, str) else json.dumps(cell))


INFINITY, NOT_A_NUMBER = "\\infty", "\\mathrm{nan}"


def _render_latex_number(number: float) -> str:
    """Render a number, in math mode if it needs it: `3.5`, `$-3.5$` or `$1.513\\times 10^{10}$`."""
    mantissa, mark, exponent = format_number(number, commas=NO_COMMAS).partition("e")
    if mark:
        return f"${mantissa}\\times 10^{{{int(exponent)}}}$"
    return f"${mantissa}$" if mantissa.startswith("-") else mantissa


_LATEX = {
    "\\": "\\textbackslash{}",
    "{": "\\{",
    "}": "\\}",
    "$": "\\$",
    "&": "\\&",
    "#": "\\#",
    "%": "\\%",
    "_": "\\_",
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "\\textquotedbl{}",
    "[": "{[}",  # after the end of a row, a bracket would begin an optional argument
    "*": "{*}",  # the same for a star
}
"""Maps each character with a meaning in LaTeX to its replacement."""


def _escape_latex(text: str) -> str:
    text = "".join(_LATEX.get(character, character) for character in escape_control(text))
    return re.sub("(?<=-)-|(?<=[`'?!])[`']|(?<=,),", r"{}\g<0>", text)  # these pairs would become one character


_RENDERERS: dict[TableForm, Callable[[Sequence[str], Sequence[Sequence[object]]], str]] = {
    "csv": _render_csv,
    "latex": _render_latex,
}
