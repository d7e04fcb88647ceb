"""Compare the scalars that a record lists with the scalars that a checkpoint stores.

Verification uses this module, and an edit in place that finds its manifest already applied. It reads headers and the
recorded scalars only, and must not import the planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import EditRecord, ScalarRecord
from swsurgery.errors import NumberError
from swsurgery.storage.dtypes import convert_to_json


class ScalarFault(NamedTuple):
    """A recorded scalar that differs from the stored one.

    `contradicts` is True if the record contradicts itself or the headers, and False if only the stored bits differ.
    """

    message: str
    contradicts: bool


def compare_scalar(record: ScalarRecord, checkpoint: Checkpoint) -> ScalarFault | None:
    """Compare a recorded scalar's dtype, offset, values and bits with this checkpoint; return None if they match."""
    edit = record if isinstance(record, EditRecord) else None
    shard = checkpoint.shards.get(record.file)
    if shard is None or record.tensor not in shard.tensors:
        return ScalarFault("the record names a scalar that the shards do not have", True)
    info = shard.tensors[record.tensor].stored
    try:
        offset = shard.find_offset(record.tensor, record.index)
        old = record.old_bytes
        recorded = edit.new_bytes if edit else old
    except (IndexError, NumberError) as error:
        return ScalarFault(f"the record's entry is invalid: {error}", True)
    if offset != record.offset or info.dtype.name != record.dtype:
        recorded_place = f"the record puts it at byte {record.offset} as {record.dtype}"
        return ScalarFault(f"{recorded_place}, the header at byte {offset} as {info.dtype.name}", True)
    values = [(record.old, old)] + ([(edit.new, recorded)] if edit else [])
    if any(value != convert_to_json(info.dtype, bits) for value, bits in values):
        return ScalarFault("the record's values do not match its bits", True)
    stored = shard.read_scalar(record.tensor, record.index)
    if stored == recorded:
        return None
    wanted = edit.new_bits if edit else record.old_bits
    return ScalarFault(f"the scalar is 0x{stored[::-1].hex()}, not {wanted}", False)


def list_protected(record: Record, checkpoint: Checkpoint) -> list[ScalarRecord]:
    """List the scalars that this record or an earlier one protects, except those in files that are not here."""
    names = {f.name for f in checkpoint.files}
    protected = [r for r in record.protected if r.file in names or r.file not in record.elsewhere]
    # An earlier step may have protected scalars of a file that is elsewhere, or of another copy of the weights.
    return protected + [entry for _, entry in record.list_inherited() if entry.file in checkpoint.shards]


def find_repeated(record: Record) -> Iterator[ScalarRecord]:
    """Yield each entry of a record for a scalar that an earlier entry also lists.

    Such a record proves nothing: putting back the old bits of one entry could hide a change that the other declares.
    """
    seen: set[tuple[str, int]] = set()
    for entry in (*record.edits, *record.protected):
        if (entry.file, entry.offset) in seen:
            yield entry
        seen.add((entry.file, entry.offset))
