"""Build the splices that undo the edits of a record."""

from __future__ import annotations

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import EditRecord, Record
from swsurgery.errors import CheckpointError, NumberError
from swsurgery.storage.splice import Splice


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
    info = shard.tensors.get(edit.tensor) if shard else None
    if shard is None or info is None:
        return None
    try:
        splice = Splice(
            edit.file, edit.coordinate, info.dtype, edit.offset, edit.new_bytes, op="set", new=edit.old_bytes
        )
        offset = shard.find_offset(edit.tensor, edit.index)
    except (IndexError, NumberError):
        return None
    return splice if (info.dtype.name, offset) == (edit.dtype, edit.offset) else None


def list_reversion_notes(record: Record) -> tuple[str, ...]:
    """Return notes for the user about files of the base that a reversion cannot restore."""
    if record.omitted:
        return (f"these files were not restored, because the edit left them out: {', '.join(record.omitted)}",)
    return ()
