"""Define what a page consists of, and the parts that several pages have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swsurgery.sharing.page.markup import NEW_LINE, Markup, join, make_code, make_list, make_section, make_tag
from swsurgery.sharing.page.svg import BASE_MARK, NULL_MARK, Figure, SvgMark
from swsurgery.sharing.page.values import Document, read_integer, read_map, read_text, read_texts


@dataclass(frozen=True)
class Page:
    """One page: its title, the answer in a sentence or two, and its sections."""

    title: str
    answer: Markup
    sections: tuple[Markup, ...]


MARKS_BY_VERDICT = {
    "needed alone": BASE_MARK,
    "needed jointly": SvgMark("triangle", "orange"),
    "inert": NULL_MARK,
    "untested": SvgMark("triangle", "ink", solid=False),
    "": SvgMark("square", "vermilion", solid=False),
}
"""The mark of each verdict of the causal test. "" is the mark of a candidate that was not tested."""


def show_figure(caption: str, figure: Figure) -> Markup:
    """Render a figure below its caption."""
    return make_tag("figure", make_tag("figcaption", caption), figure.render())


def show_figures(figures: Iterable[Markup]) -> Markup:
    """Render figures beside one another, or below one another on a narrow screen."""
    kept = [figure for figure in figures if figure]
    return make_tag("div", *kept, class_="figures") if kept else Markup("")


def show_commands(lines: Iterable[str]) -> Markup:
    """Render commands for a shell, one on each line."""
    return make_tag("pre", join(lines, NEW_LINE)) if lines else Markup("")


def show_notes(document: Document) -> Markup:
    """Render the notes of a result."""
    return make_section("Notes", make_list(read_texts(document, "notes")))


def show_measured(document: Document, conditions: Document) -> Markup:
    """Render how figures were measured. `document` has the keys of a measured text, `conditions` dtype and device."""
    tokens, windows = read_integer(document, "scored_tokens"), read_integer(document, "windows")
    digest = read_text(document, "sha256") or read_text(document, "text_sha256")
    where = f"{read_text(conditions, 'dtype')} on {read_text(conditions, 'device')}"
    amount = f"Measured on {tokens:,} tokens in {windows:,} windows" if tokens and windows else "Measured"
    parts: list[object] = [f"{amount}, {where}."]
    if protocol := read_text(read_map(document, "protocol"), "description"):
        parts.append(f" Protocol {protocol}.")
    if digest:
        parts += [" The text has the sha256 ", make_code(digest), "."]
    return make_tag("p", *parts, class_="aside")
