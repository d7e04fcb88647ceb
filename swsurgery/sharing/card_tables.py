"""Render the tables of a card: the changes, what is protected, the known super weights and the accepted findings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import EditRecord, RegionRecord, ScalarRecord
from swsurgery.checkpoint.region_summary import RegionSummary, summarise_changes, summarise_protected
from swsurgery.sharing.markdown import escape, render_code, render_table
from swsurgery.storage.coordinate import Coordinate
from swsurgery.verifying.findings import Finding

ShortForm = tuple[int, int, int, object]
"""The short form of a coordinate: its layer, row, column, and expert or None."""


def render_changes(record: Record, short: Mapping[Coordinate, ShortForm]) -> list[str]:
    """Render a table of the edited scalars, and a table with one row per edit of regions."""
    changes = summarise_changes(record)
    scalars = [_render_edits(record.edits, short)] if record.edits or not changes else []
    return [*scalars, _render_regions(changes)] if changes else scalars


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


def _format_index(record: ScalarRecord) -> str:
    return render_code(list(record.index))


def _render_place(short: ShortForm | None) -> Sequence[str]:
    """Render the three cells of a table for layer, row and column. The layer's cell includes the expert."""
    if short is None:
        return ["\\-"] * 3
    layer, row, column, expert = short
    return render_code(layer if expert is None else f"{layer}, expert {expert}"), str(row), str(column)


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


def render_protected(protected: Sequence[ScalarRecord]) -> list[str]:
    """Render the section about protected scalars; nothing if there are none."""
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


def render_protected_regions(regions: Sequence[RegionRecord]) -> list[str]:
    """Render the section about protected regions; nothing if there are none."""
    if not regions:
        return []
    rows = [
        [render_code(entry.target), str(entry.scalars), _name_tensors(entry.tensors)]
        for entry in summarise_protected(regions)
    ]
    return ["## Protected regions: the same bits as in the base", render_table(("target", "scalars", "tensors"), rows)]


def _name_tensors(names: Sequence[str]) -> str:
    """Name the first tensor, and count the others."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{render_code(names[0])}{more}" if names else "\\-"


def render_known(record: Record) -> list[str]:
    """Render the section about edited and protected scalars that are known super weights; nothing if there are none."""
    rows = []
    for entry in (*record.edits, *record.protected):
        if fact := entry.known:
            sources = ", ".join(render_code(str(source.get("cite", ""))) for source in fact.sources[:20])
            rows.append([render_code(fact.id), render_code(entry.coordinate), render_code(fact.status), sources])
    return ["## Known super weights", render_table(("known as", "scalar", "status", "sources"), rows)] if rows else []


def render_accepted(accepted: Sequence[Finding]) -> list[str]:
    """Render the section about the findings that the publisher accepted; nothing if there are none."""
    if not accepted:
        return []
    rows = [[render_code(f.rule), render_code(f.file or "-"), escape(f.message)] for f in accepted]
    said = "The publisher knew these findings and accepted them."
    return ["## Accepted findings", said, render_table(("finding", "file", "what"), rows)]
