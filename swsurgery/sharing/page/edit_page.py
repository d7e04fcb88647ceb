"""Render what an edit changes: the result of `apply`, the plan of a dry run, and the record of a checkpoint."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence

from swsurgery.errors import pluralise
from swsurgery.sharing.page.bits import show_bits
from swsurgery.sharing.page.check_parts import describe_effect, show_check
from swsurgery.sharing.page.markup import (
    MAX_TABLE_ROWS,
    Markup,
    escape,
    join,
    make_code,
    make_facts,
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
    read_number,
    read_text,
    read_texts,
    show_index,
    show_number,
    show_scalar,
    show_value,
)
from swsurgery.storage.numbers import format_size

MAX_CARDS = 24
"""Maximum number of scalars that are shown with all their bits. The others are rows of a table."""


def render_apply(subject: str, document: Document) -> Page:
    """Render the document of `apply`, or of `apply --dry-run`, for the manifest `subject`."""
    output = read_text(document, "output")
    edits = read_maps(document, "splices")
    sections = [
        *show_edits(edits, document),
        *show_check(read_map(document, "check")),
        _show_files(read_map(document, "files"), edits),
        show_notes(document),
        _show_next(output, document) if output else Markup(""),
    ]
    failures = read_list(document, "check", "failures")
    title = f"{subject} applied" if output else f"{subject}: what it would change"
    title = f"{subject}: rejected by the check" if failures else title
    return Page(title, _describe(document, edits, output), tuple(sections))


def render_record(subject: str, document: Document) -> Page:
    """Render the record of a patched checkpoint."""
    edits = read_maps(document, "edits")
    base = read_map(document, "base")
    facts = [
        ("base", read_text(base, "repo_id") or "a directory"),
        ("revision", read_text(base, "revision") or None),
        ("steps", str(len(read_list(document, "history")) + 1)),
        ("written by", f"swsurgery {read_text(document, 'swsurgery_version')}"),
    ]
    sections = [
        make_section("Base", make_facts(facts)),
        *show_edits(edits, document),
        *show_check(read_map(document, "check")),
        _show_files(read_map(document, "files"), edits),
        _show_next(subject, document),
    ]
    return Page(f"The record of {subject}", _describe(document, edits, subject), tuple(sections))


def show_edits(edits: Sequence[Document], document: Document) -> list[Markup]:
    """Render the edited scalars, the quantised elements and regions, and what is protected."""
    return [
        make_section("Scalars", *_show_scalars(edits)),
        make_section("Elements of quantised weights", _show_codes(read_maps(document, "codes"))),
        make_section("Regions", _show_regions([*read_maps(document, "changes"), *read_maps(document, "rewrites")])),
        make_section("Protected", _show_protected(document)),
    ]


def count_changed(document: Document, edits: Sequence[Document]) -> int:
    """Return the number of changed scalars. In a plan, every scalar of a region counts."""
    changes = [read_integer(change, "changed") or 0 for change in read_maps(document, "changes")]
    planned = [read_integer(rewrite, "scalars") or 0 for rewrite in read_maps(document, "rewrites")]
    return len(edits) + sum(changes) + sum(planned)


def _describe(document: Document, edits: Sequence[Document], output: str) -> Markup:
    """Return the answer: how many scalars differ, the effect, and the digest against which this can be proved."""
    changed, total = count_changed(document, edits), read_integer(document, "scalars")
    amount = f"{changed:,} of {total:,} scalars" if total else pluralise(changed, "scalar")
    if not output:
        most = "at most " if read_maps(document, "rewrites") else ""
        effect = describe_effect(read_map(document, "check"))
        answer = f"{most}{amount} would differ{f'; {effect}' if effect else ''}."
        rejected = read_list(document, "check", "failures")
        why = "The check rejected the edit, so nothing was written." if rejected else "Nothing was written."
        return escape(f"{answer[0].upper()}{answer[1:]} {why}")
    parts: list[object] = [f"{amount} {'differs' if changed == 1 and not total else 'differ'}"]
    if effect := describe_effect(read_map(document, "check")):
        parts.append(f"; {effect}")
    digests = _list_digests(read_map(document, "files"), edits, read_maps(document, "changes"))
    if digests:
        more = f" and {len(digests) - 1} more" if len(digests) > 1 else ""
        parts += ["; provable against the base’s sha256 ", make_code(digests[0]), more]
    return join([*parts, "."])


def _list_digests(files: Document, edits: Iterable[Document], changes: Iterable[Document]) -> list[str]:
    """List the sha256 in the base of each file with an edit."""
    names = dict.fromkeys(read_text(entry, "file") for entry in (*edits, *changes))
    digests = (read_text(files, name, "base_sha256") for name in names)
    return [digest for digest in digests if digest]


def _show_scalars(edits: Sequence[Document]) -> list[Markup]:
    rest = [
        [make_code(show_scalar(edit)), read_text(edit, "op"), show_value(edit.get("old")), show_value(edit.get("new"))]
        for edit in edits[MAX_CARDS:]
    ]
    cards = [_show_scalar(edit) for edit in edits[:MAX_CARDS]]
    legend: list[Markup] = []
    if edits:
        names = ("sign", "exponent", "fraction")
        words = join([make_tag("span", name, class_=name) for name in names], ", ")
        legend = [make_tag("p", "Bits: ", words, ". Changed bits are underlined.", class_="aside")]
    return [*legend, *cards, make_table(("scalar", "operation", "old", "new"), rest, numeric=(2, 3))]


def _show_scalar(edit: Document) -> Markup:
    dtype, old, new = (read_text(edit, key) for key in ("dtype", "old_bits", "new_bits"))
    factor = show_number(edit.get("factor"))
    bits = ", ".join(str(bit) for bit in read_list(edit, "bit"))
    offset = read_integer(edit, "offset")
    operation = read_text(edit, "op") + (f" by {factor}" if factor else "") + (f" bit {bits}" if bits else "")
    facts = [
        ("operation", operation),
        ("before", _show_stored(dtype, edit.get("old"), old, new)),
        ("after", _show_stored(dtype, edit.get("new"), new, old)),
        ("stored in", join([make_code(read_text(edit, "file")), f" at byte {offset:,}" if offset is not None else ""])),
        ("dtype", dtype),
        ("known as", read_text(edit, "known", "id") or None),
    ]
    return make_tag("div", make_tag("h3", make_code(show_scalar(edit))), make_facts(facts), class_="scalar")


def _show_stored(dtype: str, value: object, bits: str, other: str) -> Markup:
    shown = show_value(value) or (value if isinstance(value, str) else "not a number")
    return join([make_tag("strong", shown), " ", make_code(bits), make_tag("div", show_bits(dtype, bits, other))])


def _show_codes(codes: Sequence[Document]) -> Markup:
    rows = []
    for code in codes:
        wanted, new = read_number(code, "wanted"), read_number(code, "new")
        error = None if wanted is None or new is None else show_number(abs(new - wanted))
        place = f"{read_text(code, 'weight')}{show_index(code.get('index'))}"
        numbers = (code.get("old_code"), code.get("new_code"))
        rows.append(
            [
                make_code(place),
                read_text(code, "op"),
                read_text(code, "layout"),
                *(show_value(number) for number in numbers),
                *(show_number(code.get(key)) for key in ("old", "new", "wanted")),
                None if read_text(code, "op") == "protect" else error,
            ]
        )
    header = ("element", "operation", "layout", "old code", "new code", "old", "new", "wanted", "error")
    return make_table(header, rows, numeric=(3, 4, 5, 6, 7, 8))


def _show_regions(changes: Sequence[Document]) -> Markup:
    """Render one row for each edit that changes regions, with the sums over its regions."""
    groups: dict[tuple[str, ...], list[Document]] = {}
    for change in changes:
        options = json.dumps(change.get("options"), sort_keys=True, default=str)
        key = (str(change.get("edit")), read_text(change, "op"), read_text(change, "target"), options)
        groups.setdefault(key, []).append(change)
    rows = []
    for (_, op, target, _), group in groups.items():
        options = ", ".join(f"{key} {_show_option(value)}" for key, value in read_map(group[0], "options").items())
        names = list(dict.fromkeys(read_text(change, "tensor") for change in group))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        changed = [read_integer(change, "changed") for change in group]
        rows.append(
            [
                op,
                target,
                options,
                None if None in changed else f"{sum(number or 0 for number in changed):,}",
                f"{sum(read_integer(change, 'scalars') or 0 for change in group):,}",
                join([make_code(names[0]), more]),
            ]
        )
    return make_table(("operation", "target", "options", "changed", "of scalars", "tensors"), rows, numeric=(3, 4))


def _show_option(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _show_protected(document: Document) -> Markup:
    scalars = read_maps(document, "protected")
    rows = [
        [make_code(show_scalar(entry)), show_value(entry.get("old")), read_text(entry, "old_bits")] for entry in scalars
    ]
    regions = read_maps(document, "protected_regions")
    for entry in regions:
        rows.append([join([read_text(entry, "target"), " in ", make_code(read_text(entry, "tensor"))]), None, None])
    return make_table(("scalar or region", "value", "bits"), rows, numeric=(1,))


def _show_files(files: Document, edits: Sequence[Document]) -> Markup:
    """Render the files with their digests. Files with edits are first, with the bytes that were edited."""
    offsets: dict[str, list[int]] = {}
    for edit in edits:
        offset = read_integer(edit, "offset")
        offsets.setdefault(read_text(edit, "file"), []).extend([] if offset is None else [offset])
    named = {name: entry for name, entry in files.items() if isinstance(entry, Mapping)}
    rows = []
    for name in sorted(named, key=lambda name: (name not in offsets, name))[: MAX_TABLE_ROWS + 1]:
        entry, places = named[name], sorted(offsets.get(name, []))
        digests = [read_text(entry, key) for key in ("base_sha256", "sha256")]
        some = ", ".join(f"{place:,}" for place in places[:8]) + (" ..." if len(places) > 8 else "")
        size = read_integer(entry, "size")
        rows.append(
            [
                make_code(name),
                None if size is None else format_size(size),
                some or None,
                _show_digest(digests[0]),
                "the same" if digests[0] == digests[1] else _show_digest(digests[1]),
            ]
        )
    header = ("file", "size", "edited bytes begin at", "sha256 in the base", "sha256 now")
    return make_section("Files", make_table(header, rows, numeric=(1,)))


def _show_digest(digest: str) -> Markup:
    if not digest:
        return escape("not hashed")
    return make_tag("code", escape(digest), class_="digest")


def _show_next(output: str, document: Document) -> Markup:
    """Render the commands that prove and undo the edits."""
    place = shlex.quote(output)
    lines = [f"swsurgery verify {place}", f"swsurgery revert {place} -o DIRECTORY"]
    if any(change.get("undo") is None for change in read_maps(document, "changes")):
        lines[1] += " --base BASE"
    words = (
        "verify puts the old bytes back while it hashes each edited file. If the sha256 is that of the base’s file, "
        "exactly the scalars above differ. revert restores the base, byte for byte."
    )
    left_out = read_texts(document, "omitted")
    aside = make_tag("p", f"Left out of the copy: {', '.join(left_out)}", class_="aside") if left_out else ""
    return make_section("Verify and revert", make_tag("p", words), show_commands(lines), aside)
