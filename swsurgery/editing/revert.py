"""Write the base of a patched checkpoint from its record alone, without the base."""

from __future__ import annotations

from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.checkpoint.record import EditRecord, Record, read_record
from swsurgery.editing.apply import refuse_inside, write_own_files
from swsurgery.editing.copy import CopyJob, Link, write_checkpoint
from swsurgery.errors import CheckpointError, NumberError
from swsurgery.progress import Progress, Silent
from swsurgery.storage import staging
from swsurgery.storage.arguments import require_choice
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.splice import Splice


def revert(root: Path, output: Path, *, link: Link = "auto", progress: Progress | None = None) -> list[str]:
    """Write the base of the patched checkpoint `root` into `output`, byte for byte, and return notes for the user.

    If several manifests were applied one after the other, only the last is undone. Raises CheckpointError, PlanError if
    a file was changed since the edit, TargetError if `output` cannot be written.
    """
    require_choice("link", link, ("auto", "clone", "copy"))
    with held(root) as entered:
        patched = read_record(entered)
        checkpoint = read_checkpoint(entered, patched.record.base)
        refuse_inside(output, checkpoint)
        record, previous = patched.record, patched.rebuild_previous()
        names = {f.name for f in checkpoint.files}
        if missing := [name for name in record.files if name not in names]:
            raise CheckpointError(
                f"cannot revert, because these files are missing: {', '.join(missing)}",
                checkpoint.root,
                "restore them",
            )
        source = CopyJob(
            files=tuple(f for f in checkpoint.files if f.name in record.files),
            splices=build_undo(record, checkpoint),
            pins={name: (entry.sha256, "its record") for name, entry in record.files.items() if entry.sha256},
            in_cache=checkpoint.in_cache,
            shards=checkpoint.shards,
        )
        with staging.stage_output(output, source.names, OWN_FILES, source.folder_mode) as stage:
            applied = write_checkpoint(source, stage, link=link, progress=progress or Silent())
            for file in applied.files:
                if file.patched_digest != (record.files[file.name].base_sha256 or file.patched_digest):
                    raise CheckpointError(
                        "reverting this file would not restore the base, because the record was changed", file.name
                    )
            if previous:
                write_own_files(stage, previous, source.own_mode)
    return list_reversion_notes(record)


def build_undo(record: Record, checkpoint: Checkpoint) -> tuple[Splice, ...]:
    """Build the splices that undo the edits of a record.

    Raises CheckpointError if an edit is not of a scalar of the checkpoint: a record that was changed could name any
    byte.
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
    """Build the splice that undoes one edit; None if the checkpoint has no such scalar."""
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


def list_reversion_notes(record: Record) -> list[str]:
    """List what a reversion cannot restore."""
    if record.omitted:
        return [f"not restored, because the edit had left them out: {', '.join(record.omitted)}"]
    return []
