"""Restore the base of a patched checkpoint from the patched files and their record, without a copy of the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, open_checkpoint, read_checkpoint
from swsurgery.checkpoint.record import Record, read_record
from swsurgery.editing.apply import refuse_inside, write_own_files
from swsurgery.editing.copy import write_checkpoint
from swsurgery.editing.copy_job import CopyJob, Link
from swsurgery.editing.in_place import revert_in_place
from swsurgery.editing.undo import build_undo, build_undo_changes, list_reversion_notes
from swsurgery.errors import CheckpointError, SwsurgeryError, list_some
from swsurgery.hub import open_location, parse_directory, parse_location
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage import staging
from swsurgery.storage.arguments import require_choice, require_location, require_path
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.result import Result

MAX_NOTED_FILES = 20
"""Maximum number of files that a note about left-out files names."""


@dataclass(frozen=True, repr=False)
class Reverted(Result):
    """The result of `revert`: the base was restored in the directory `output`.

    `notes` list files that could not be restored, edits that remain, or a record that was changed since the edit.
    """

    output: Path
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return the document that `revert --json` prints."""
        return {"output": str(self.output), "notes": list(self.notes)}


def revert(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    link: Link = "auto",
    base: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Reverted:
    """Restore the base of a patched checkpoint, byte for byte, from the patched files and their record.

    `checkpoint` is a directory; a checkpoint on the Hub must be downloaded first. The base is written into the new
    directory `output` or, without `output`, replaces the patched checkpoint. `link` is as in `apply`, but "hard" is not
    accepted. If several manifests were applied one after the other, only the last one is undone. If an edit in place
    was interrupted, only that edit is undone. `base` is needed, with `output`, if the old bytes of changed regions
    exceeded the undo limit.

    Raises TypeError, HubError, CheckpointError; PlanError if a file was changed since the edit; TargetError if the
    target cannot be written.
    """
    reporter = require_reporter(reporter)
    require_choice("link", link, ("auto", "clone", "copy"))
    root = parse_directory(require_location("checkpoint", checkpoint))
    if output is None:
        if link != "auto":
            raise SwsurgeryError("--link needs -o, because a reversion in place copies no files")
        if base is not None:
            raise SwsurgeryError("--base needs -o")
        return Reverted(root, revert_in_place(root, reporter))
    target = require_path("output", output)
    with held(root) as entered, contextlib.ExitStack() as bases:
        patched = read_record(entered)
        opened = read_checkpoint(entered, patched.record.base, gguf=True)
        refuse_inside(target, opened)
        record, previous = patched.record, patched.rebuild_previous()
        names = {f.name for f in opened.files}
        notes = list_reversion_notes(patched, opened)
        if missing := [name for name in record.files if name not in names]:
            raise CheckpointError(
                f"cannot revert, because these files are missing: {', '.join(missing)}",
                opened.root,
                "restore them",
            )
        original = _open_base(base, bases) if base is not None else None
        job = CopyJob(
            files=tuple(f for f in opened.files if f.name in record.files),
            splices=build_undo(record, opened),
            pins={name: (entry.sha256, "its record") for name, entry in record.files.items() if entry.sha256},
            in_cache=opened.in_cache,
            shards=opened.shards,
            changes=build_undo_changes(record, opened, original),
        )
        with staging.stage_output(target, job.names, OWN_FILES, job.folder_mode) as stage:
            copied = write_checkpoint(job, stage, link=link, progress=reporter)
            for file in copied.files:
                if file.patched_digest != (record.files[file.name].base_sha256 or file.patched_digest):
                    raise CheckpointError(
                        "reverting this file would not restore the base, because the record was changed", file.name
                    )
            if previous:
                write_own_files(stage, previous, job.own_mode)
    return Reverted(target, (*notes, *_list_left_out(record, names)))


def _list_left_out(record: Record, names: Iterable[str]) -> list[str]:
    """Return a note about the files of the patched checkpoint that the new directory does not contain."""
    extra = sorted(set(names) - {*record.files, *record.own_names})
    if not extra:
        return []
    return [f"left out, because the record does not list them: {list_some(extra, MAX_NOTED_FILES)}"]


def _open_base(base: str | Path, bases: contextlib.ExitStack) -> Checkpoint:
    """Open the base with the old bytes of changed regions, and lock it."""
    where = open_location(parse_location(require_location("base", base)))
    return open_checkpoint(bases.enter_context(held(where)), gguf=True)
