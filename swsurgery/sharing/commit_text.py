"""Describe the edits of a publication for its commit: the message, and the description below it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.region_summary import count_changed, summarise_changes
from swsurgery.errors import escape_control, pluralise
from swsurgery.verifying.findings import Finding


def summarise_edits(record: Record, changed: int | None = None) -> str:
    """Summarise the edits in one line, for the commit's message. `changed` replaces the record's number of scalars."""
    number, base = count_changed(record) if changed is None else changed, record.base
    of = f" of {base.repo_id}" if base.repo_id else ""
    at = f"@{base.revision[:12]}" if base.repo_id and base.revision else ""
    return f"{pluralise(number, 'scalar')}{of}{at} changed"


def describe_edits(record: Record, accepted: Iterable[Finding]) -> str:
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
