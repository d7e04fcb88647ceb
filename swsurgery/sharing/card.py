"""Render the model card of a published checkpoint from its record: fields for the front matter, and the Markdown text.

Pure functions on text. Words from files are not trusted: they are escaped, so that Markdown shows them as text only.
The base's own card is quoted unchanged in a code block. As Markdown, its images, links and raw HTML would appear to be
this repository's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import EditRecord, RegionRecord, ScalarRecord
from swsurgery.checkpoint.region_summary import (
    RegionSummary,
    count_changed,
    summarise_changes,
    summarise_protected,
)
from swsurgery.errors import escape_control, pluralise
from swsurgery.sharing.markdown import MAX_CARD_ROWS, escape, fence, render_code, render_table
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.names import FIGURE_NAME
from swsurgery.storage.numbers import NO_COMMAS, format_number
from swsurgery.verifying.findings import Finding

ShortForm = tuple[int, int, int, object]
"""The short form of a coordinate: its layer, row, column, and expert or None."""

FIELDS = (
    "base_model",
    "base_model_relation",
    "library_name",
    "pipeline_tag",
    "language",
    "license",
    "license_name",
    "license_link",
    "tags",
)
"""Fields that the front matter, the YAML block at the top of the card, may contain, in order."""

RELATION = "finetune"
"""How the Hub relates a patched checkpoint to its base. The Hub has four relations: adapter, merge, quantized and
finetune. "finetune" fits best, because values change and the format does not.
"""

PATCH_RELATION = "adapter"
"""How the Hub relates a patch to its base: as an adapter, because the patch is useless without the base."""

OWN_TAGS = ("swsurgery", "super-weights")
"""Tags of every published checkpoint."""

PATCH_TAGS = (*OWN_TAGS, "patch")
"""Tags of every published patch."""

MAX_QUOTED_MANIFEST, MAX_CARD = 64 << 10, 200 << 10
"""Limits of a card: bytes of the manifest that it quotes, and characters of the base's card that it quotes. What the
card omits is in the files themselves."""

FIGURE = f"![Perplexity of base and patched model, and the largest hidden state after each layer]({FIGURE_NAME})"
"""The line of Markdown that shows the figure of the check."""

_LINE = re.compile(r"(?=.*\S)[^<>]{1,200}")
"""Pattern for free text in the front matter, such as a licence's name. It excludes < and >, because a Markdown reader
that does not know front matter would read them as HTML. `_is_match` refuses line breaks and control characters."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/+-]{0,99}")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_LINK = re.compile(r"(?=.{1,500}\Z)(https?://[A-Za-z0-9.-]+(/[A-Za-z0-9._~/%#?=&+-]*)?|[A-Za-z0-9][A-Za-z0-9._/-]*)")
_CARRIED = {
    "library_name": _WORD,
    "pipeline_tag": _WORD,
    "language": _LINE,
    "license": _LINE,
    "license_name": _LINE,
    "license_link": _LINK,
    "tags": _TAG,
}
"""Fields copied from the base's front matter, and the pattern that each value must match."""

LICENCE = ("language", "license", "license_name", "license_link")
"""Fields that the card of a patch copies from the base's card."""

_LISTS = ("language", "license", "tags")

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}")


def make_fields(record: Record, base_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the front matter: the base, the tags, and what is copied from the base's card."""
    found: dict[str, Any] = {}
    if record.base.repo_id and _REPO_ID.fullmatch(record.base.repo_id):
        found["base_model"], found["base_model_relation"] = record.base.repo_id, RELATION
    for name, pattern in _CARRIED.items():
        value = base_fields.get(name)
        if values := [each for each in _list_values(name, value)[:MAX_CARD_ROWS] if _is_match(pattern, each)]:
            found[name] = values if isinstance(value, list) or name in ("language", "tags") else values[0]
    carried = [tag for tag in found.get("tags", ()) if not tag.startswith("base_model:")]
    found["tags"] = list(dict.fromkeys([*carried, *OWN_TAGS]))
    return {name: found[name] for name in FIELDS if name in found}


def list_omitted_fields(base_fields: Mapping[str, Any], of: Iterable[str] = _CARRIED) -> list[str]:
    """List the fields of the base's card that the front matter omits completely or in part."""
    found = []
    for name in of:
        values = _list_values(name, base_fields.get(name))
        if len(values) > MAX_CARD_ROWS or not all(_is_match(_CARRIED[name], each) for each in values):
            found.append(name)
    return found


def make_patch_fields(record: Record, base_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a patch's front matter, with the base's licence and languages.

    The library is swsurgery and the task is omitted, because no other library can load a patch as a model.
    """
    found = make_fields(record, base_fields)
    if "base_model_relation" in found:
        found["base_model_relation"] = PATCH_RELATION
    found |= {"library_name": "swsurgery", "tags": list(PATCH_TAGS)}
    return {name: found[name] for name in FIELDS if name in found and name != "pipeline_tag"}


def _is_match(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and pattern.fullmatch(value) is not None


def _list_values(name: str, value: object) -> list[Any]:
    """Return the values of one field as a list. The language code "no" (Norwegian) is false in YAML 1.1."""
    values = value if isinstance(value, list) and name in _LISTS else [] if value is None else [value]
    return ["no" if name == "language" and each is False else each for each in values]


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
        *_render_changes(record, short or {}),
        *_render_protected([*record.protected, *(entry for _, entry in record.list_inherited())]),
        *_render_protected_regions([entry for _, entry in record.list_protected_regions()]),
        *_render_known(record),
        "## The check",
        _check(record.check),
        *([FIGURE] if has_figure else []),
        *_render_accepted(accepted),
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
    check = [_check(record.check), *([FIGURE] if has_figure else [])]
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
        *_render_changes(record, short or {}),
        *_render_known(record),
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
        *_render_accepted(accepted),
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
    return name + (f" at commit `{record.base.revision}`" if _is_match(_PLAIN, record.base.revision) else "")


def _get_base_uri(record: Record) -> str | None:
    """Return the base's hf:// location for a shell command, or None if it is unknown or unsafe in a shell."""
    base = record.base
    parts = [(_REPO_ID, base.repo_id), (_PLAIN, base.revision), *([(_FOLDER, base.sub)] if base.sub else [])]
    if not all(_is_match(pattern, part) for pattern, part in parts):
        return None
    return f"hf://{base.repo_id}@{base.revision}" + (f"/{base.sub}" if base.sub else "")


def _format_index(record: ScalarRecord) -> str:
    return render_code(list(record.index))


def _render_place(short: ShortForm | None) -> Sequence[str]:
    """Render the three cells of a table for layer, row and column. The layer's cell includes the expert."""
    if short is None:
        return ["\\-"] * 3
    layer, row, column, expert = short
    return render_code(layer if expert is None else f"{layer}, expert {expert}"), str(row), str(column)


def _render_edits(edits: Sequence[EditRecord], short: Mapping[Coordinate, ShortForm]) -> str:
    if not edits:
        return "Nothing."
    rows = [
        [
            render_code(e.tensor),
            _format_index(e),
            *_render_place(short.get(e.coordinate)),
            render_code(e.dtype),
            render_code(e.old),
            render_code(e.new),
            render_code(e.op) + (f" by {render_code(e.factor)}" if e.factor is not None else ""),
            f"{render_code(e.old_bits)} to {render_code(e.new_bits)}",
        ]
        for e in edits
    ]
    return render_table(("tensor", "index", "layer", "row", "column", "dtype", "old", "new", "operation", "bits"), rows)


def _render_changes(record: Record, short: Mapping[Coordinate, ShortForm]) -> list[str]:
    """Render a table of the edited scalars, and a table with one row per edit of regions."""
    changes = summarise_changes(record)
    scalars = [_render_edits(record.edits, short)] if record.edits or not changes else []
    return [*scalars, _render_regions(changes)] if changes else scalars


def _render_regions(changes: Sequence[RegionSummary]) -> str:
    rows = [
        [
            render_code(change.op),
            render_code(change.target),
            ", ".join(
                f"{escape(name)} {render_code(_shorten(value))}" for name, value in sorted(change.options.items())
            )
            or "\\-",
            str(change.changed),
            str(change.scalars),
            _name_tensors(change.tensors),
        ]
        for change in changes
    ]
    header = ("operation", "target", "options", "changed scalars", "of", "tensors")
    return render_table(header, rows)


def _shorten(value: object) -> str:
    """Return an option as text; a group of options, such as `clip` of round, as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _name_tensors(names: Sequence[str]) -> str:
    """Name the first tensor, and count the others."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{render_code(names[0])}{more}" if names else "\\-"


def _render_protected_regions(regions: Sequence[RegionRecord]) -> list[str]:
    if not regions:
        return []
    rows = [
        [render_code(entry.target), str(entry.scalars), _name_tensors(entry.tensors)]
        for entry in summarise_protected(regions)
    ]
    return ["## Protected regions: the same bits as in the base", render_table(("target", "scalars", "tensors"), rows)]


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


def _render_protected(protected: Sequence[ScalarRecord]) -> list[str]:
    if not protected:
        return []
    rows = [
        [render_code(p.tensor), _format_index(p), render_code(p.dtype), render_code(p.old), render_code(p.old_bits)]
        for p in protected
    ]
    return [
        "## Protected: the same bits as in the base",
        render_table(("tensor", "index", "dtype", "value", "bits"), rows),
    ]


def _render_known(record: Record) -> list[str]:
    rows = []
    for entry in (*record.edits, *record.protected):
        if fact := entry.known:
            sources = ", ".join(render_code(str(source.get("cite", ""))) for source in fact.sources[:20])
            rows.append([render_code(fact.id), render_code(entry.coordinate), render_code(fact.status), sources])
    return ["## Known super weights", render_table(("known as", "scalar", "status", "sources"), rows)] if rows else []


def _check(check: Mapping[str, Any]) -> str:
    kind, reason = check.get("kind"), check.get("reason")
    why = f" ({escape(reason)})" if reason else ""
    if kind == "off":
        return f"No check was made{why}."
    if kind != "forward":
        return f"The weights were read back: exactly the scalars above differ. The model was not run{why}."
    rows = []
    for name in ("perplexity", "loss"):
        sides = [check[side].get(name) if isinstance(check.get(side), dict) else None for side in ("base", "patched")]
        if any(side is not None for side in sides):
            rows.append([name, *map(_format_figure, sides)])
    mass = check.get("stopword_mass")
    if isinstance(mass, dict):
        rows.append(["stopword mass", _format_figure(mass.get("base")), _format_figure(mass.get("patched"))])
    text = check.get("text")
    tokens = text.get("scored_tokens") if isinstance(text, dict) else None
    lines = [
        "Base and patched model on the same text, side by side:",
        render_table(("figure", "base", "patched"), rows),
        f"Perplexity ratio {_format_figure(check.get('perplexity_ratio'))}, "
        f"KL divergence {_format_figure(check.get('kl'))}, over {_format_figure(tokens)} tokens; "
        f"device {render_code(check.get('device'))}, dtype "
        f"{render_code(check.get('dtype'))}. Verdict: {'passed' if check.get('ok') is True else '**failed**'}.",
    ]
    return "\n\n".join(lines)


def _format_figure(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return render_code(value)
    return format_number(value, 6, NO_COMMAS)


def _render_accepted(accepted: Sequence[Finding]) -> list[str]:
    if not accepted:
        return []
    rows = [[render_code(f.rule), render_code(f.file or "-"), escape(f.message)] for f in accepted]
    said = "The publisher knew these findings and accepted them."
    return ["## Accepted findings", said, render_table(("finding", "file", "what"), rows)]


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


def describe(record: Record, accepted: Iterable[Finding]) -> str:
    """Render a commit's description as plain text: one line for each edit and each accepted finding, and the base."""
    lines = [f"{escape_control(str(e.coordinate))}: {e.old_bits} to {e.new_bits}" for e in record.edits[:20]]
    if len(record.edits) > 20:
        lines.append(f"and {len(record.edits) - 20} more")
    changes = summarise_changes(record)
    lines += [escape_control(change.describe()) for change in changes[:20]]
    if len(changes) > 20:
        lines.append(f"and {len(changes) - 20} more edits")
    lines += [f"accepted: {f.rule}: {escape_control(f.file or '-')}: {escape_control(f.message)}" for f in accepted]
    lines.append(f"base: {json.dumps({'repo_id': record.base.repo_id, 'revision': record.base.revision})}")
    return "\n".join(line[:500] for line in lines)
