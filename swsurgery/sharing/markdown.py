"""Render words that are not trusted as Markdown that shows them as text only.

Pure functions on text. card.py makes model cards with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from swsurgery.errors import escape_control

MAX_NAME = 200
"""Maximum number of characters of a name in a card."""

MAX_CARD_ROWS = 200
"""Maximum number of rows of a table or a list in a card. The files themselves contain what the card omits."""

_CODE = re.compile(r"[A-Za-z0-9_.+/\[-]([A-Za-z0-9_.,+/\[\] -]*[A-Za-z0-9_.+/\]-])?")
_PUNCTUATION = re.compile(r"([!-,./:-@\[-`{-~]|(?<![A-Za-z0-9])-|-(?![A-Za-z0-9]))")
"""Matches all ASCII punctuation except a hyphen within a word."""


def escape(value: object) -> str:
    """Escape `value` as one line of Markdown with at most MAX_NAME characters, which is safe in a table's cell."""
    text = escape_control(str(value))
    if len(text) > MAX_NAME:
        text = text[: MAX_NAME - 3] + "..."
    return _PUNCTUATION.sub(r"\\\1", text.strip()) or "\\-"


def render_code(value: object) -> str:
    """Render `value` as inline code, or as escaped text if it contains characters that are unsafe in code."""
    text = str(value)
    return f"`{text}`" if len(text) <= MAX_NAME and _CODE.fullmatch(text) else escape(text)


def fence(text: str, language: str = "") -> str:
    """Render `text` as a code block that its content cannot close."""
    lines = [escape_control(line.replace("\t", "    ")) for line in text.splitlines()]
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, *lines, fence])


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a table with at most MAX_CARD_ROWS rows. Cells are inserted as they are given."""
    lines = [header, ["---"] * len(header), *rows[:MAX_CARD_ROWS]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    if len(rows) > MAX_CARD_ROWS:
        table += f"\n\nand {len(rows) - MAX_CARD_ROWS} more, all in `swsurgery.json`."
    return table
