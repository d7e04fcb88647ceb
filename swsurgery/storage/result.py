"""Show the results of public functions: one line in a terminal, a table in a notebook.

Must not depend on what the results contain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from html import escape
from typing import ClassVar

from swsurgery.errors import escape_control
from swsurgery.storage.arguments import is_path

MAX_TEXT = 60
"""Maximum number of characters of a text that a repr shows."""

MAX_REPR = 300
"""Maximum number of characters of a repr."""

MAX_HTML_ROWS = 40
"""Maximum number of rows of a table in a notebook."""


SCHEMA_VERSIONS: dict[str, int] = {}
"""Versions of the JSON documents of commands. A command without an entry has version 1.

A version changes if a field is removed or gets another meaning. New fields do not change it.
"""


def name_schema(command: str) -> str:
    """Return the name of the JSON Schema of a command's document, such as "swsurgery/verify/1"."""
    return f"swsurgery/{command}/{SCHEMA_VERSIONS.get(command, 1)}"


class Result:
    """A frozen value that a public function returns. It has a one-line repr and a JSON document."""

    shown: ClassVar[tuple[str, ...]] = ()
    """Names of the properties that the repr shows before the fields."""

    def to_json(self) -> Mapping[str, object]:
        """Return the document that the command for this result prints with --json, as strict JSON types.

        The command adds the field `schema`, the name of the JSON Schema of the document.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        parts = (f"{name}: {text}" for name, value in _list_fields(self) if (text := _summarise(value)))
        line = f"{type(self).__name__}({', '.join(parts)})"
        return line if len(line) <= MAX_REPR else f"{line[: MAX_REPR - 4]}...)"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Render the repr for a notebook."""
        return f"<p><code>{escape(repr(self))}</code></p>"


class TableResult(Result):
    """A result that is also a table."""

    def to_rows(self) -> list[dict[str, object]]:
        """Return one dict per row, all with the same keys. pandas.DataFrame accepts the list."""
        raise NotImplementedError

    def list_columns(self) -> tuple[str, ...]:
        """Return the keys of the rows. A result that may have no rows returns them then too."""
        return tuple(next(iter(self.to_rows()), ()))

    def _repr_html_(self) -> str:
        """Render the repr and the first MAX_HTML_ROWS rows for a notebook."""
        rows = self.to_rows()
        if not rows:
            return super()._repr_html_()
        lines = [_render_row("th", rows[0])]
        lines += [_render_row("td", row.values()) for row in rows[:MAX_HTML_ROWS]]
        more = f"<p>and {len(rows) - MAX_HTML_ROWS} more</p>" if len(rows) > MAX_HTML_ROWS else ""
        return f"{super()._repr_html_()}<table>{''.join(lines)}</table>{more}"


def _list_fields(result: Result) -> Iterator[tuple[str, object]]:
    """Yield the name and value of each property and field that the repr of a dataclass or pydantic model shows."""
    yield from ((name, getattr(result, name)) for name in result.shown)
    if dataclasses.is_dataclass(result):
        yield from ((f.name, getattr(result, f.name)) for f in dataclasses.fields(result) if f.repr)
    else:
        yield from vars(result).items()


def _summarise(value: object) -> str:
    """Format the value of a field for the repr: a shortened text, a number, a result, or the number of items.

    Returns "" for an empty collection and for a value of any other type. The repr leaves out such a field.
    """
    if is_path(value):
        text = str(value)
        return repr(text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}...")
    if isinstance(value, bool | int | float | Result):
        return repr(value)
    if isinstance(value, Collection) and not isinstance(value, bytes):
        return str(len(value)) if value else ""
    return ""


def _render_row(tag: str, cells: Collection[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(escape_control(str(cell)))}</{tag}>' for cell in cells)}</tr>"
