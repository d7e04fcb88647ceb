"""Render the result of a command as one HTML page, which loads nothing and runs no script.

`PAGES` maps each command to the function that renders its JSON document. All text of the document is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from swsurgery._version import __version__
from swsurgery.sharing.page.check_parts import describe_effect, show_check
from swsurgery.sharing.page.curve_pages import render_comparison, render_sweep
from swsurgery.sharing.page.edit_page import render_apply
from swsurgery.sharing.page.known_page import render_lookup
from swsurgery.sharing.page.markup import Markup, escape, join, make_tag
from swsurgery.sharing.page.parts import Page
from swsurgery.sharing.page.scan_page import render_scan
from swsurgery.sharing.page.values import Document, read_map, read_texts
from swsurgery.sharing.page.verify_page import render_verification

MAX_PAGE = 300_000
"""Maximum size of a page in bytes. Sections that do not fit are left out, and the page says so."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy of a page: the browser loads nothing, and runs no script even if one were in the page."""


def _render_check(subject: str, document: Document) -> Page:
    effect = describe_effect(document)
    words = f"{effect}." if effect else "the model ran. There was no base to compare it with."
    if not read_texts(document, "failures") and not any(read_map(document, "bounds").values()):
        answer = join([words[:1].upper(), words[1:], " No bound was set." if effect else ""])
    else:
        failed = bool(read_texts(document, "failures"))
        verdict = make_tag("span", "FAILED" if failed else "OK", class_="bad" if failed else "good")
        answer = join([verdict, ": ", words])
    return Page(f"Check of {subject}", answer, tuple(show_check(document)))


PAGES: dict[str, Callable[[str, Document], Page]] = {
    "apply": render_apply,
    "check": _render_check,
    "scan": render_scan,
    "sweep": render_sweep,
    "compare": render_comparison,
    "verify": render_verification,
    "lookup": render_lookup,
}
"""The page of each command: a function of the subject (what the command was given) and of the JSON document."""


def render_page(command: str, subject: str, document: Document) -> bytes:
    """Render the JSON document of a command as one HTML page of at most MAX_PAGE bytes, in UTF-8.

    `command` is a key of PAGES. `subject` is the manifest, checkpoint or model that the command was given.
    """
    page = PAGES[command](subject, document)
    title = escape(page.title, 120)
    head = make_tag(
        "head",
        make_tag("meta", charset="utf-8"),
        make_tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        make_tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        make_tag("meta", name="referrer", content="no-referrer"),
        make_tag("title", title),
        make_tag("style", Markup(read_style("page.css") + read_style("figure.css"))),
    )
    begin = [make_tag("h1", title), make_tag("p", page.answer, class_="answer")]
    end = make_tag("footer", make_tag("p", f"Made by swsurgery {__version__} {command}."))
    room = MAX_PAGE - len(join([head, *begin, end]).encode()) - 1000
    body = make_tag("body", *begin, make_tag("main", *_choose_sections(page.sections, room)), end)
    return f"<!DOCTYPE html>\n{make_tag('html', head, body, lang='en')}\n".encode()


def _choose_sections(sections: Sequence[Markup], room: int) -> list[Markup]:
    """Return the sections, and a line in place of each section that does not fit into `room` bytes."""
    found: list[Markup] = []
    for section in sections:
        size = len(section.encode())
        if size > room:
            section = make_tag("p", "A section is left out because it is too long: use --json.", class_="aside")
            size = 100
        room -= size
        found.append(section)
    return found


@cache
def read_style(name: str) -> str:
    """Read a style sheet of this package."""
    return Path(__file__).with_name(name).read_text("utf-8")
