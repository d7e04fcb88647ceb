"""Build the splices that undo the edits of a record."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import RECORD_NAME, SUMS_NAME, Patched, Record
from swsurgery.checkpoint.record_entries import EditRecord, RegionRecord
from swsurgery.errors import CheckpointError, NumberError
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.shard import Shard, open_shard
from swsurgery.storage.splice import Splice
from swsurgery.storage.strict_json import read_small

if TYPE_CHECKING:  # these modules import numpy, which only changes of regions need
    from swsurgery.rewriting.function import Function
    from swsurgery.rewriting.segments import RegionChange
    from swsurgery.rewriting.stored import RegionPlace


def build_undo(record: Record, checkpoint: Checkpoint) -> tuple[Splice, ...]:
    """Build the splices that undo the edits of a record.

    Raises CheckpointError if a recorded scalar does not exist in the checkpoint at the recorded offset and with the
    recorded dtype. Without this check, a record that someone changed could make `revert` overwrite any byte.
    """
    splices: list[Splice] = []
    for edit in record.edits:
        splice = _undo(edit, checkpoint) if edit.file in record.files else None
        if splice is None:
            raise CheckpointError(
                "the record lists a scalar that does not exist",
                f"{edit.coordinate} in {edit.file}",
                "restore swsurgery.json",
            )
        splices.append(splice)
    return tuple(splices)


def _undo(edit: EditRecord, checkpoint: Checkpoint) -> Splice | None:
    """Build the splice that undoes one edit.

    Returns None if the recorded scalar does not exist, or if its offset, dtype or width in bytes differ from the
    record. The stored value is not read.
    """
    shard = checkpoint.shards.get(edit.file)
    stored = shard.tensors.get(edit.tensor) if shard else None
    if shard is None or stored is None:
        return None
    info = stored.stored
    try:
        splice = Splice(
            edit.file, edit.coordinate, info.dtype, edit.offset, edit.new_bytes, op="set", new=edit.old_bytes
        )
        offset = shard.find_offset(edit.tensor, edit.index)
    except (IndexError, NumberError):
        return None
    return splice if (info.dtype.name, offset) == (edit.dtype, edit.offset) else None


def build_undo_changes(
    record: Record, checkpoint: Checkpoint, base: Checkpoint | None = None
) -> dict[str, list[RegionChange]]:
    """Return, for each file, the changes that put back the old bytes of the changed regions of a record.

    The old bytes are read from the undo file, or from `base` if it is given. Raises CheckpointError if the record lists
    a region that does not exist, if the undo file is missing, modified or belongs to another record, and if neither an
    undo file nor a base contains the old bytes.
    """
    if not record.changes:
        return {}
    from swsurgery.rewriting.segments import RegionChange
    from swsurgery.rewriting.stored import StoredRows
    from swsurgery.rewriting.undo import make_undo_function

    undo = None if base else _open_undo(record, checkpoint)
    changes: dict[str, list[RegionChange]] = {}
    for number, entry in enumerate(record.changes):
        place = _find_place(entry, checkpoint) if entry.file in record.files else None
        if place is None:
            what = "the record lists a region that does not exist"
            raise CheckpointError(what, f"{entry.region} in {entry.file}", "restore swsurgery.json")
        if base is not None:
            theirs = _find_place(entry, base)
            if theirs is None:
                raise CheckpointError(f"the base has no region {entry.region}", base.root, "give the right base")
            function: Function = StoredRows(base.shards[entry.file].file, theirs)
        else:
            assert undo is not None
            function = make_undo_function(undo, entry.undo or "", place)
        where = (place.info, place.start, place.region)
        digested = (entry.base_sha256, entry.sha256) != (None, None)
        change = RegionChange(f"undo.{number}", "restore", *where, function, order=(number, 0), digested=digested)
        changes.setdefault(entry.file, []).append(change)
    return changes


def _open_undo(record: Record, checkpoint: Checkpoint) -> Shard:
    """Open the undo file of a record. Raises CheckpointError if it is missing or is not the recorded file."""
    if record.undo is None or record.undo_name is None:
        what = "the old bytes were not stored, because they exceeded the undo limit"
        raise CheckpointError(what, checkpoint.root, "give the base with --base")
    file = next((f for f in checkpoint.files if f.name == record.undo_name), None)
    if file is None:
        where = f"{checkpoint.root}/{record.undo_name}"
        raise CheckpointError("the undo file is missing", where, "restore it, or give the base with --base")
    if file.size != record.undo.size or hash_file(file.source) != record.undo.sha256:
        what = "the undo file was changed, or belongs to another record"
        raise CheckpointError(what, file.source, "restore it, or give the base with --base")
    return open_shard(file.source)


def _find_place(entry: RegionRecord, checkpoint: Checkpoint) -> RegionPlace | None:
    """Return the place of a recorded region; None if the headers have no such region of the recorded dtype."""
    from swsurgery.rewriting.stored import find_place

    shard = checkpoint.shards.get(entry.file)
    return find_place(shard, entry.region, entry.dtype) if shard else None


def list_reversion_notes(patched: Patched, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return notes for the user about what a reversion cannot restore, or may restore with faults."""
    record, notes = patched.record, []
    if record.omitted:
        notes.append(f"these files were not restored, because the edit left them out: {', '.join(record.omitted)}")
    if record.history and _is_record_changed(patched, checkpoint):
        what = (
            f"{SUMS_NAME} lists another digest of {RECORD_NAME}, so the record of the earlier step may be damaged too"
        )
        notes.append(f"{what} (run swsurgery verify on the result)")
    return tuple(notes)


def _is_record_changed(patched: Patched, checkpoint: Checkpoint) -> bool:
    """Return True if SHA256SUMS exists and does not contain the line of the record as it was read."""
    sums = next((file.source for file in checkpoint.files if file.name == SUMS_NAME), None)
    if sums is None:
        return False
    line = f"{hashlib.sha256(patched.record_raw).hexdigest()}  {RECORD_NAME}".encode()
    return line not in read_small(sums, SUMS_NAME).splitlines()
