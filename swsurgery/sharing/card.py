"""Render the model card of a published checkpoint or patch from its record, as Markdown.

Pure functions on text. Words from files are not trusted: they are escaped, so that Markdown shows them as text only.
The base's own card is quoted unchanged in a code block. As Markdown, its images, links and raw HTML would appear to be
this repository's own.

    card_fields.py      the fields of the front matter, above the text
    card_tables.py      the tables of the text
    card_check.py       the sanity check
    card_activation.py  the largest activation

The functions of this module combine them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.region_summary import count_changed
from swsurgery.errors import pluralise
from swsurgery.sharing.card_activation import render_largest
from swsurgery.sharing.card_check import render_check
from swsurgery.sharing.card_fields import REPO_ID, is_match
from swsurgery.sharing.card_tables import (
    ShortForm,
    render_accepted,
    render_changes,
    render_known,
    render_protected,
    render_protected_regions,
)
from swsurgery.sharing.markdown import escape, fence, render_code
from swsurgery.storage.coordinate import Coordinate
from swsurgery.verifying.findings import Finding

MAX_QUOTED_MANIFEST, MAX_CARD = 64 << 10, 200 << 10
"""Limits of a card: bytes of the manifest that it quotes, and characters of the base's card that it quotes. What the
card omits is in the files themselves."""

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}")


def render_body(
    record: Record,
    repo_id: str,
    manifest: bytes,
    base_card: str | None = None,
    accepted: Sequence[Finding] = (),
    short: Mapping[Coordinate, ShortForm] | None = None,
    has_figure: bool = False,
) -> str:
    """Render the Markdown text of a checkpoint's card.

    `base_card` is the base's card without its front matter. `accepted` are the findings that the publisher accepted.
    `short` maps each coordinate that has a short form to this form. `has_figure` is True if the repository contains the
    figure of the check.
    """
    name = _get_base_name(record)
    parts = [
        f"# {escape(repo_id.split('/')[-1])}",
        f"This is {name}, with {pluralise(count_changed(record), 'scalar')} changed and every other byte of its "
        "weights unchanged. Made by swsurgery, which recorded each change in `swsurgery.json`.",
        "## What was changed",
        *render_changes(record, short or {}),
        *render_protected([*record.protected, *(entry for _, entry in record.list_inherited())]),
        *render_protected_regions([entry for _, entry in record.list_protected_regions()]),
        *render_known(record),
        "## The check",
        *render_check(record.check, has_figure),
        *render_largest(record),
        *render_accepted(accepted),
        "## Verify",
        "On the Hub, or in a local copy:",
        fence(f"swsurgery verify hf://{repo_id}\nswsurgery verify DIRECTORY", "sh"),
        _describe_proof(record),
        "## Revert",
        *_render_reversion(record, repo_id),
        "## Manifest",
        _render_manifest(manifest),
        *_render_base_card(name, base_card),
    ]
    return "\n\n".join(parts) + "\n"


def render_patch_body(
    record: Record,
    repo_id: str,
    manifest: bytes,
    patch_name: str,
    size: int,
    accepted: Sequence[Finding] = (),
    short: Mapping[Coordinate, ShortForm] | None = None,
    changed: int | None = None,
    has_figure: bool = False,
) -> str:
    """Render the Markdown text of the card of a patch, the file `patch_name` of `size` bytes.

    `record` contains all edits since the first base, and lists no files. `accepted`, `short` and
    `has_figure`: see `render_body`.
    `changed` is the number of scalars in the patch, by default that of the record.
    """
    place = _get_base_uri(record)
    base = place or "BASE"
    steps = len(record.history) + 1
    number = count_changed(record) if changed is None else changed
    check = render_check(record.check, has_figure)
    if steps > 1:
        check.insert(
            0, f"The edits were made in {steps} steps. The check of the last step compares it with the step before:"
        )
    parts = [
        f"# {escape(repo_id.split('/')[-1])}",
        f"A patch of {size} bytes for {_get_base_name(record)}, which changes "
        f"{pluralise(number, 'scalar')} of its weights. There are no weights in this repository. "
        "Made by swsurgery.",
        "## What it changes",
        *render_changes(record, short or {}),
        *render_known(record),
        "## Apply",
        fence(
            f"hf download {repo_id} {patch_name} --local-dir .\nswsurgery apply {patch_name} --base {base} -o patched",
            "sh",
        ),
        *([] if place else ["`BASE` is the directory of the checkpoint that the patch was made from."]),
        "The patch is refused if the base has other bits at these coordinates, or if a shard to be edited has another "
        "sha256. If torch is installed, the model is run before and after, and `patched` is written only if that "
        "check passes. Or in Python, in memory:",
        fence(f'import swsurgery\n\nmodel = swsurgery.load_patched("{patch_name}", "{base}")', "python"),
        "## The check",
        "\n\n".join(check),
        *render_largest(record),
        *render_accepted(accepted),
        "## Verify and revert",
        fence(
            "sha256sum -c SHA256SUMS       # this repository, as it was downloaded\n"
            "swsurgery verify patched      # the base's files, with exactly these scalars changed\n"
            "swsurgery revert patched      # the base's files again, byte for byte",
            "sh",
        ),
        "## Manifest",
        _render_manifest(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _get_base_name(record: Record) -> str:
    name = render_code(record.base.repo_id) if record.base.repo_id else "a checkpoint that is not on the Hub"
    return name + (f" at commit `{record.base.revision}`" if is_match(_PLAIN, record.base.revision) else "")


def _get_base_uri(record: Record) -> str | None:
    """Return the base's hf:// location for a shell command, or None if it is unknown or unsafe in a shell."""
    base = record.base
    parts = [(REPO_ID, base.repo_id), (_PLAIN, base.revision), *([(_FOLDER, base.sub)] if base.sub else [])]
    if not all(is_match(pattern, part) for pattern, part in parts):
        return None
    return f"hf://{base.repo_id}@{base.revision}" + (f"/{base.sub}" if base.sub else "")


def _describe_proof(record: Record) -> str:
    """Describe how `verify` proves the checkpoint."""
    old = "the old values of the table above"
    if record.undo:
        old = f"the old values, which are in `swsurgery.json` and `{record.undo_name}`,"
    elif record.changes:
        return (
            "The old values of the changed regions are not stored, because they are too large. In a local copy, "
            "`swsurgery verify DIRECTORY --base BASE` computes each edit again from the base and compares every byte. "
            "Without the base, `verify` compares the files and regions with the sha256 in `swsurgery.json`."
        )
    return (
        f"In a local copy, this hashes each file with {old} put back. If the result is the "
        "base's sha256, which the base's own repository shows, the file is the base's with exactly these scalars "
        "changed. On the Hub, it reads the edited scalars and relies on the sha256 that the Hub lists for large files."
    )


def _render_reversion(record: Record, repo_id: str) -> list[str]:
    """Render how to restore the base's weights."""
    if record.changes and not record.undo:
        return [f"The old values are not stored. Download the base instead: {_get_base_name(record)}."]
    return [
        fence(f"hf download {repo_id} --local-dir DIRECTORY\nswsurgery revert DIRECTORY", "sh"),
        "This restores the base's weights, byte for byte.",
    ]


def _render_manifest(manifest: bytes) -> str:
    if len(manifest) > MAX_QUOTED_MANIFEST:
        return f"Its {len(manifest)} bytes are in `manifest.yaml`."
    return fence(manifest.decode("utf-8", "replace"), "yaml")


def _render_base_card(name: str, card: str | None) -> list[str]:
    if not card or not card.strip():
        return []
    cut = "" if len(card) <= MAX_CARD else f" Its first {MAX_CARD} characters:"
    quoted = fence(card[:MAX_CARD].strip("\r\n"), "markdown")
    return [f"## The base's own card\n\nBy the authors of {name}, quoted verbatim.{cut}", quoted]
