"""Build HTML and SVG elements from text that is not trusted.

Every element is made by `make_tag`. It escapes all text that it gets, except Markup, which is the result of an earlier
call. So no name, token or prompt can add an element or an attribute.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from swsurgery.errors import escape_control

MAX_PAGE_TEXT = 400
"""Maximum number of characters of one text on a page. A tensor's name may have thousands of characters."""

MAX_TABLE_ROWS = 60
"""Maximum number of rows of one table."""

VOID = ("meta", "br")
"""Elements of HTML that have no content and no end tag."""

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")


class Markup(str):
    """Text that is HTML or SVG, so that it is not escaped again. Only this module makes Markup of other text."""

    __slots__ = ()


NEW_LINE = Markup("\n")
"""A line break inside a `pre` element."""


def escape(text: object, limit: int = MAX_PAGE_TEXT) -> Markup:
    """Escape a text for HTML and SVG: as the content of an element, and as the value of an attribute in quotes.

    Control, bidirectional and surrogate characters are replaced by escapes such as \\u202e. A text of more than `limit`
    characters is cut. Markup is returned unchanged.
    """
    if isinstance(text, Markup):
        return text
    words = str(text)
    words = words if len(words) <= limit else f"{words[: limit - 1]}…"
    return Markup(html.escape(escape_control(words)))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Join texts and elements. Texts are escaped."""
    return Markup(escape(between).join(escape(part) for part in parts))


def make_tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Make an element with `children`, which are texts or elements.

    In the name of an attribute, `_` stands for `-`, and a `_` at the end is left out: `class_`, `font_size`. An
    attribute with the value None is left out.
    """
    assert _NAME.fullmatch(name), name
    opened = name
    for key, value in attributes.items():
        written = key.removesuffix("_").replace("_", "-")
        assert _NAME.fullmatch(written), written
        opened += "" if value is None else f' {written}="{escape(value)}"'
    if name in VOID:
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{join(children)}</{name}>")


def make_code(text: object, limit: int = MAX_PAGE_TEXT) -> Markup:
    """Make an element for a name, a value or a command, in a font of equal widths."""
    return make_tag("code", escape(text, limit))


def make_table(header: Sequence[object], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()) -> Markup:
    """Make a table with at most MAX_TABLE_ROWS rows. Columns in `numeric`, counted from 0, are aligned to the right.

    A cell that is None is empty, and a column with empty cells only is left out. On a narrow screen the table scrolls,
    and the page does not.
    """
    kept = [at for at in range(len(header)) if any(row[at] not in (None, "") for row in rows)]
    if not kept:
        return Markup("")
    numeric = [kept.index(at) for at in numeric if at in kept]
    header = [header[at] for at in kept]
    rows = [[row[at] for at in kept] for row in rows]

    def make_row(cell: str, cells: Sequence[object]) -> Markup:
        kinds = ["number" if at in numeric else None for at in range(len(cells))]
        texts = ["" if text is None else text for text in cells]
        return make_tag("tr", *(make_tag(cell, text, class_=kind) for text, kind in zip(texts, kinds, strict=True)))

    body = [make_row("td", row) for row in rows[:MAX_TABLE_ROWS]]
    table = make_tag("table", make_tag("thead", make_row("th", header)), make_tag("tbody", *body))
    more = (
        make_tag("p", f"and {len(rows) - MAX_TABLE_ROWS:,} more", class_="aside") if len(rows) > MAX_TABLE_ROWS else ""
    )
    return join([make_tag("div", table, class_="scroll"), more])


def make_facts(facts: Iterable[tuple[str, object]]) -> Markup:
    """Make a list of named facts. A fact that is None is left out."""
    pairs = [join([make_tag("dt", name), make_tag("dd", value)]) for name, value in facts if value is not None]
    return make_tag("dl", *pairs) if pairs else Markup("")


def make_list(items: Sequence[object]) -> Markup:
    """Make a list with at most MAX_TABLE_ROWS items; nothing if there are none."""
    more = [f"and {len(items) - MAX_TABLE_ROWS:,} more"] if len(items) > MAX_TABLE_ROWS else []
    return make_tag("ul", *(make_tag("li", item) for item in [*items[:MAX_TABLE_ROWS], *more])) if items else Markup("")


def make_section(title: str, *parts: object) -> Markup:
    """Make a section with a heading; nothing if all its parts are empty."""
    kept = [part for part in parts if part]
    return make_tag("section", make_tag("h2", title), *kept) if kept else Markup("")
