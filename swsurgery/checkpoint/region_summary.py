"""Summarise the regions of a record: one entry for each edit of rows, columns, experts, slices or whole tensors.

An edit may change hundreds of regions, such as every matrix that a glob names. People read one line for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import ChangeRecord, RegionRecord
from swsurgery.errors import pluralise


@dataclass(frozen=True)
class RegionSummary:
    """All regions of one edit with the same operation and target.

    `target` is the edit's target as text, such as "L3 row 12". `tensors` contains the names of the tensors, and
    `scalars` is the number of scalars in the regions. `changed` is the number of scalars with other bits after the
    edit, None for a protected region. `is_undoable` is True if the undo file contains the old bytes.
    """

    op: str
    target: str
    options: Mapping[str, Any]
    tensors: tuple[str, ...]
    scalars: int
    changed: int | None = None
    is_undoable: bool = False

    def describe(self) -> str:
        """Describe the edit in one line, such as "zero L3 row 12: 4096 of 4096 scalars changed in 1 tensor"."""
        scalars = pluralise(self.scalars, "scalar")
        amount = scalars if self.changed is None else f"{self.changed} of {scalars} changed"
        return f"{self.describe_operation()} {self.target}: {amount} in {pluralise(len(self.tensors), 'tensor')}"

    def describe_operation(self) -> str:
        """Return the operation with its options, such as "round bits=4 block=128"."""
        return describe_operation(self.op, self.options)


def describe_operation(op: str, options: Mapping[str, Any]) -> str:
    """Return an operation with its options, such as "round bits=4 block=128"."""
    return " ".join([op, *(f"{name}={_format_option(value)}" for name, value in sorted(options.items()))])


def summarise_changes(record: Record) -> list[RegionSummary]:
    """Return one entry for each operation and target of the edits that change regions, in the manifest's order."""
    groups: dict[tuple[int, str, str, str], list[ChangeRecord]] = {}
    for change in record.changes:
        options = json.dumps(change.options, sort_keys=True)
        groups.setdefault((change.edit, change.op, change.target, options), []).append(change)
    return [
        RegionSummary(
            group[0].op,
            group[0].target,
            group[0].options,
            _list_tensors(group),
            sum(change.scalars for change in group),
            sum(change.changed for change in group),
            all(change.undo is not None for change in group),
        )
        for group in groups.values()
    ]


def summarise_protected(regions: Iterable[RegionRecord]) -> list[RegionSummary]:
    """Return one entry for each target whose regions are protected."""
    groups: dict[str, list[RegionRecord]] = {}
    for region in regions:
        groups.setdefault(region.target, []).append(region)
    return [
        RegionSummary("protect", target, {}, _list_tensors(group), sum(region.scalars for region in group))
        for target, group in groups.items()
    ]


def count_changed(record: Record) -> int:
    """Return the number of scalars that a record's step changed, alone or in regions."""
    return len(record.edits) + sum(change.changed for change in record.changes)


def _list_tensors(regions: Sequence[RegionRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(region.tensor for region in regions))


def _format_option(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
