"""Render the result of `verify`: the answer, the findings, and what was proved."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from swsurgery.errors import pluralise
from swsurgery.sharing.page.markup import (
    NEW_LINE,
    Markup,
    escape,
    join,
    make_code,
    make_list,
    make_section,
    make_table,
    make_tag,
)
from swsurgery.sharing.page.parts import Page, show_commands, show_notes
from swsurgery.sharing.page.values import (
    Document,
    read_integer,
    read_list,
    read_map,
    read_maps,
    read_text,
    read_texts,
    show_scalar,
    show_value,
)


def render_verification(subject: str, document: Document) -> Page:
    """Render the document of `verify`. Its key `checked` contains the lines about what was proved, as text."""
    sections = (
        make_section("Findings", _show_findings(read_maps(document, "findings"))),
        make_section("What was proved", *_show_proof(document), _show_lines(document)),
        make_section("Known super weights", _show_known(read_map(document, "known"))),
        make_section("Rules that were checked", _show_rules(read_texts(document, "rules"))),
        show_notes(document),
        make_section("Repeat it", show_commands([f"swsurgery verify {shlex.quote(subject)}"])),
    )
    return Page(f"Verification of {subject}", _describe(document), sections)


def _describe(document: Document) -> Markup:
    word, colon, rest = read_text(document, "answer").partition(":")
    if colon:
        kind = {"OK": "good", "NO": "bad"}.get(word)
        return join([make_tag("span", word, class_=kind), colon, rest])
    findings = read_maps(document, "findings")
    errors = sum(read_text(finding, "level") == "error" for finding in findings)
    if errors:
        return join([make_tag("span", "NO", class_="bad"), f": {pluralise(errors, 'finding')}."])
    if document.get("decided") is False:
        return escape("Undecided: what was asked could not be compared.")
    warnings = f", with {pluralise(len(findings), 'warning')}" if findings else ""
    return join([make_tag("span", "OK", class_="good"), f": nothing contradicts what was checked{warnings}."])


def _show_findings(findings: Sequence[Document]) -> Markup:
    rows = []
    for finding in findings:
        level = read_text(finding, "level")
        place = [read_text(finding, "file"), show_scalar(finding)]
        if manifest := read_text(finding, "manifest"):
            numbers = (read_integer(finding, key) for key in ("line", "column"))
            place.append(":".join([manifest, *(str(number) for number in numbers if number is not None)]))
        rows.append(
            [
                make_tag("span", level, class_="bad" if level == "error" else None),
                make_code(read_text(finding, "rule")),
                join([make_code(part) for part in place if part], " "),
                read_text(finding, "message"),
            ]
        )
    return make_table(("level", "rule", "where", "what"), rows)


def _show_proof(document: Document) -> list[Markup]:
    """Render the files whose bytes are the base's after the edits are undone, with the digests."""
    if not read_list(document, "proved"):
        return []
    names = [make_code(name) for name in read_texts(document, "proved")]
    rest = [make_code(read_text(entry, "file")) for entry in read_maps(document, "proved")]
    words = "With the declared edits put back, these files have the base’s sha256:"
    return [make_tag("p", words), make_list([*names, *rest])] if names or rest else []


def _show_lines(document: Document) -> Markup:
    lines = [line for line in read_texts(document, "checked") if line.strip()]
    return make_tag("pre", join(lines, NEW_LINE)) if lines else Markup("")


def _show_known(known: Document) -> Markup:
    rows = [
        [
            make_code(read_text(one, "id") or show_scalar(one)),
            read_text(one, "status"),
            show_value(one.get("known")),
            show_value(one.get("stored")),
            read_text(one, "state"),
            read_text(one, "reason") or None,
        ]
        for one in read_maps(known, "coordinates")
    ]
    return make_table(("scalar", "status", "known value", "stored value", "state", "reason"), rows, numeric=(2, 3))


def _show_rules(rules: Sequence[str]) -> Markup:
    return make_tag("p", join([make_code(rule) for rule in rules], ", ")) if rules else Markup("")
