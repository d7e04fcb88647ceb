"""List the steps of a patched checkpoint: the manifests that were applied one after the other, and what they did."""

from __future__ import annotations

import re
from collections.abc import Iterator

from swsurgery.checkpoint.checkpoint import Step
from swsurgery.checkpoint.record import MANIFEST_NAME, Patched, Record
from swsurgery.checkpoint.record_entries import CodeRecord, EditRecord
from swsurgery.checkpoint.region_summary import describe_operation, summarise_changes, summarise_protected
from swsurgery.errors import CheckpointError
from swsurgery.storage.strict_json import parse_json

_NAME = re.compile(r"""^name:[ \t]+(["']?)([A-Za-z0-9][A-Za-z0-9._-]*)\1[ \t]*(?:#.*)?$""", re.MULTILINE)
"""The line of a YAML manifest that states its name."""


def list_steps(patched: Patched) -> tuple[Step, ...]:
    """List the steps of a patched checkpoint, the first one first. Raises CheckpointError for an invalid record."""
    earlier = [(step.read(), step.manifest) for step in patched.record.history]
    steps = [*earlier, (patched.record, patched.manifest_raw.decode("utf-8", "replace"))]
    return tuple(_make_step(number, record, manifest) for number, (record, manifest) in enumerate(steps, 1))


def _make_step(number: int, record: Record, manifest: str) -> Step:
    edits = tuple(_describe_edits(record))
    created, version = record.created, record.swsurgery_version
    return Step(number, _find_name(manifest), edits, created, version, record.manifest_sha256, manifest)


def _find_name(manifest: str) -> str | None:
    """Find the name that a manifest states; None if it states none. A full YAML parser would take minutes at worst."""
    if not manifest.lstrip().startswith("{"):
        match = _NAME.search(manifest)
        return match[2] if match else None
    try:
        name = parse_json(manifest.encode(), MANIFEST_NAME).get("name")
    except CheckpointError:
        return None
    return name if isinstance(name, str) else None


def _describe_edits(record: Record) -> Iterator[str]:
    """Describe each edited or protected scalar, region and quantised element in one line."""
    elements = {element.coordinate for code in record.codes for element in code.elements}
    for code in record.codes:
        yield _describe_code(code)
    for edit in record.edits:
        if edit.coordinate not in elements:
            yield _describe_edit(edit)
    for summary in (*summarise_changes(record), *summarise_protected(record.protected_regions)):
        yield summary.describe()
    for scalar in record.protected:
        if scalar.coordinate not in elements:
            yield f"protect {scalar.coordinate}: {scalar.old}"


def _describe_edit(edit: EditRecord) -> str:
    options = {} if edit.factor is None else {"factor": edit.factor}
    return f"{describe_operation(edit.op, options)} {edit.coordinate}: {edit.old} -> {edit.new}"


def _describe_code(code: CodeRecord) -> str:
    options = {} if code.factor is None else {"factor": code.factor}
    what = f"{describe_operation(code.op, options)} {code.coordinate}"
    if code.op == "protect":
        return f"{what}: {code.old} (code {code.old_code})"
    return f"{what}: {code.old} -> {code.new} (code {code.old_code} -> {code.new_code})"
