"""Apply and revert in the directory of the base: write a few bytes of each shard with edits, and copy nothing.

After the edit the base no longer exists, so its digests are checked before the edit: each shard with edits is hashed
once, and the manifest or an earlier record must state the same digest. `checkpoint/journal.py` keeps the old bytes
until the edit is complete. The changed bytes of regions are found in the same pass (`changed_bytes.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery.checkpoint import edited_shard
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import is_cache_snapshot
from swsurgery.checkpoint.opening import held_for_editing, read_checkpoint
from swsurgery.checkpoint.record import Patched, Record, find_record, read_record
from swsurgery.checkpoint.record_entries import UndoRecord
from swsurgery.editing.already_applied import report_applied
from swsurgery.editing.applied import SMALL_CHECKPOINT, Applied
from swsurgery.editing.base import collect_known_digests
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.control_checks import refuse_controls
from swsurgery.editing.copy import sort_tallies
from swsurgery.editing.copy_job import AppliedFile, Copied, compute_record_mode
from swsurgery.editing.in_place_regions import (
    MAX_UNDO,
    Changes,
    apply_changed,
    make_changed,
    make_collector,
    measure_regions,
    refuse_unlike_regions,
    render_undo,
    show_base,
)
from swsurgery.editing.pins import check_left_out
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.editing.record import complete_record, draft_record
from swsurgery.editing.sanity import combine_bounds, run_check
from swsurgery.editing.undo import build_undo, build_undo_changes, list_reversion_notes
from swsurgery.errors import CheckpointError, PlanError, TargetError
from swsurgery.hub import Uri
from swsurgery.manifest.load import LoadedManifest
from swsurgery.progress import Progress, Reporter
from swsurgery.storage import filesystem
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.hashing import check_digest, hash_file
from swsurgery.storage.names import EDITABLE_NAME, OWN_FILES, make_undo_name
from swsurgery.storage.numbers import format_size
from swsurgery.storage.pipeline import stream
from swsurgery.storage.shard import MAX_HEADER
from swsurgery.storage.splice import Splice, group_by_file

if TYPE_CHECKING:  # this module imports numpy, which only changes of regions need
    from swsurgery.editing.changed_bytes import Changed


def apply_in_place(
    loaded: LoadedManifest, base: Path | Uri, check: CheckOptions, undo_limit: int, reporter: Reporter
) -> Applied:
    """Turn the base itself into the patched checkpoint with its record; restore the base after an error.

    If this manifest was the last one applied to the directory, nothing is written. An edit of regions whose old bytes
    exceed `undo_limit` or MAX_UNDO is refused, because nothing could undo it.

    Raises CheckpointError, PlanError, ModelError; TargetError if the directory or a file in it must not be written;
    CheckFailed if the patched checkpoint fails the check.
    """
    root = _find_directory(base)
    with held_for_editing(root) as (folder, _), contextlib.ExitStack() as opened:
        checkpoint = read_checkpoint(folder, loaded.manifest.base, gguf=True)
        previous = find_record(checkpoint)
        if previous and previous.record.manifest_sha256 == hashlib.sha256(loaded.raw).hexdigest():
            found = report_applied(folder, checkpoint, loaded, previous, reporter)
            reporter.say(*found.notes)
            return found
        plan = make_plan(loaded, checkpoint)
        combine_bounds(plan, check)  # raises before anything is hashed or written
        if check.controls:
            refuse_controls(plan)
        ready = _prepare(plan, folder, undo_limit, opened, reporter, plan.notes)
        mode = compute_record_mode(checkpoint.files)
        with apply_changed(folder, ready.shards, plan.splices, ready.changed, ready.undo_name, mode=mode) as own:
            result = run_check(show_base(plan, ready.shards, ready.changed), folder, check, reporter, reporter.say)
            record = complete_record(ready.draft, ready.copied, result)
            if ready.undo_name:
                own[ready.undo_name] = ready.undo_raw
            own |= Patched(record, record.render(), plan.loaded.raw).render_own_files()
            _refuse_changed(checkpoint, ready.touched)
    return Applied(folder.path, ready.copied, record, plan.notes, scalars=plan.checkpoint.scalars)


def plan_in_place(loaded: LoadedManifest, base: Path | Uri, undo_limit: int, reporter: Reporter) -> Plan:
    """Return the plan of an edit in place. Reads and hashes the files as `apply_in_place` does, but writes nothing.

    Raises the errors of `apply_in_place`, except those of the sanity check and of writing.
    """
    with held_for_editing(_find_directory(base)) as (folder, _), contextlib.ExitStack() as opened:
        plan = make_plan(loaded, read_checkpoint(folder, loaded.manifest.base, gguf=True))
        _prepare(plan, folder, undo_limit, opened, reporter)
    return plan


@dataclass(frozen=True)
class _Prepared:
    """What an edit in place needs to write: the open shards, the changed bytes, and all of the record but the check.

    `touched` contains the names of the files that will be overwritten.
    """

    draft: Record
    shards: dict[str, edited_shard.OpenShard]
    changed: Changed | None
    copied: Copied
    touched: frozenset[str]
    undo_name: str | None
    undo_raw: bytes | None


def _prepare(
    plan: Plan,
    folder: Folder,
    undo_limit: int,
    opened: contextlib.ExitStack,
    reporter: Reporter,
    notes: Sequence[str] = (),
) -> _Prepared:
    """Open and hash the files to edit, compute the changed bytes, and check everything that can forbid the edit.

    `notes` are printed before the work that takes long.
    """
    checkpoint = plan.checkpoint
    if plan.omitted:
        raise PlanError("an edit in place cannot leave files out", ", ".join(plan.omitted), "set base.copies: keep")
    draft = draft_record(plan)
    for note in notes:
        reporter.say(note)
    pins = collect_known_digests(plan)
    check_left_out(plan, {f.name for f in checkpoint.files} - {*OWN_FILES}, pins, reporter)
    shards = _open_shards(folder, checkpoint, plan.touched, opened)
    undo_name = make_undo_name(1 + plan.earlier_steps) if plan.rewrites else None
    changes = measure_regions(plan, reporter)
    changed = make_collector(plan, changes, undo_name, undo_limit, opened)
    touched = _hash_touched(checkpoint, shards, plan.splices, changes, changed, pins, reporter)
    unchanged = _hash_protected(checkpoint, changes, changed, pins, reporter)
    undo_raw = render_undo(changed, plan, undo_limit)
    stated = plan.loaded.manifest.base.sha256
    before = plan.previous.record if plan.previous else None
    rest = _describe_untouched(checkpoint, {*touched, *unchanged}, before, pins, stated, reporter)
    edited = [
        AppliedFile(name, checkpoint.get_file(name).size, *both, "place")
        for name, both in (touched | unchanged).items()
    ]
    tallies = sort_tallies(changes, changed.tallies) if changed else ((), ())
    undo = UndoRecord(sha256=hashlib.sha256(undo_raw).hexdigest(), size=len(undo_raw)) if undo_raw else None
    copied = Copied(tuple(sorted([*edited, *rest], key=lambda f: f.name)), *tallies, undo)
    _refuse_changed(checkpoint, touched)
    _refuse_changed_records(folder, checkpoint, undo_name)
    return _Prepared(draft, shards, changed, copied, frozenset(touched), undo_name, undo_raw)


def revert_in_place(root: Path, progress: Progress) -> tuple[str, ...]:
    """Restore the base in the directory of the patched checkpoint itself, and return notes for the user.

    If several manifests were applied one after the other, only the last is undone. If an edit was interrupted, only
    that edit is undone; an interrupted reversion is repeated. Raises CheckpointError, TargetError, and PlanError if a
    file was changed since the edit.
    """
    with held_for_editing(_find_directory(root), moved=True) as (folder, cut_off), contextlib.ExitStack() as opened:
        if cut_off and not cut_off.reverts:
            return ("only the interrupted edit was undone; the edits before it remain",)
        root = folder.path
        patched = read_record(folder)
        record, previous = patched.record, patched.rebuild_previous()
        if record.undo and record.undo.size > MAX_UNDO + MAX_HEADER:
            what = f"the undo file has {format_size(record.undo.size)}, too much to revert in place"
            raise CheckpointError(what, root, "revert with -o")
        checkpoint = read_checkpoint(folder, record.base, gguf=True)
        if hashlib.sha256(patched.manifest_raw).hexdigest() != record.manifest_sha256:
            raise CheckpointError(
                "the manifest was changed since it was applied, and revert would delete it",
                root / OWN_FILES[1],
                "move it away",
            )
        notes = list_reversion_notes(patched, checkpoint)
        splices = build_undo(record, checkpoint)
        names = {f.name: f.size for f in checkpoint.files}
        if wrong := [name for name, entry in record.files.items() if names.get(name) != entry.size]:
            raise CheckpointError(
                f"cannot revert, because these files were changed or removed since the edit: {', '.join(wrong)}",
                root,
                "restore them",
            )
        pins = {name: (entry.sha256, "its record") for name, entry in record.files.items() if entry.sha256}
        changes: Changes = build_undo_changes(record, checkpoint)
        changed = make_changed("revert with -o") if changes else None
        shards = _open_shards(folder, checkpoint, {s.file for s in splices} | {*changes}, opened)
        touched = _hash_touched(checkpoint, shards, splices, changes, changed, pins, progress)
        refuse_unlike_regions(record, changed, root)
        _describe_untouched(checkpoint, touched, record, pins, (), progress)
        for name, (_, restored) in touched.items():
            if restored != record.files[name].base_sha256:
                raise CheckpointError(
                    "reverting this file would not restore the base, because the record was changed", root / name
                )
        _refuse_changed(checkpoint, touched)
        _refuse_changed_records(folder, checkpoint, record.undo_name)
        mode = compute_record_mode(checkpoint.files)
        with apply_changed(folder, shards, splices, changed, record.undo_name, reverts=True, mode=mode) as own:
            if record.undo_name:
                own[record.undo_name] = None
            own |= previous.render_own_files() if previous else dict.fromkeys(OWN_FILES)
            _refuse_changed(checkpoint, touched)
    return notes


def _find_directory(root: Path | Uri) -> Path:
    """Return the path of the directory to edit, without symbolic links.

    Raises TargetError for a base on the Hub, for a symbolic link, and for a snapshot in the Hugging Face cache, whose
    files other revisions share.
    """
    if isinstance(root, Uri):
        raise TargetError(
            "a checkpoint on the Hub cannot be edited in place", root, "download it, and give the directory with --base"
        )
    if os.path.islink(root):
        raise TargetError("the directory is a symbolic link", root, "give the directory itself")
    real = Path(os.path.realpath(root))
    if is_cache_snapshot(real):
        raise TargetError(
            "a Hugging Face cache cannot be edited in place, because other revisions and repositories share its files",
            root,
            "apply with -o",
        )
    return real


def _open_shards(
    folder: Folder, checkpoint: Checkpoint, names: Collection[str], opened: contextlib.ExitStack
) -> dict[str, edited_shard.OpenShard]:
    """Open each file to edit once, for hashing and for writing.

    Raises TargetError for a file that must not be written, and CheckpointError for a file that was replaced.
    """
    shards: dict[str, edited_shard.OpenShard] = {}
    for name in sorted(names):
        file = checkpoint.get_file(name)
        entry = file.entry
        if entry is None or entry.folder is not folder:
            raise TargetError("the file is not in the directory to edit", file.source)
        if not EDITABLE_NAME.fullmatch(name):
            what = "an edit in place accepts only names of letters, digits, dots, hyphens and underscores"
            raise TargetError(what, entry, "rename the file, or apply with -o")
        _refuse_shared(entry)
        shards[name] = edited_shard.OpenShard(entry)
        opened.callback(shards[name].close)
    return shards


def _hash_touched(
    checkpoint: Checkpoint,
    shards: dict[str, edited_shard.OpenShard],
    splices: tuple[Splice, ...],
    changes: Changes,
    changed: Changed | None,
    pins: dict[str, tuple[str, str]],
    progress: Progress,
) -> dict[str, tuple[str, str]]:
    """Read each file to edit once, and return name -> (sha256 before the edit, sha256 after it).

    Nothing is written. `changed` collects the changed bytes of regions. `pins` contains the required sha256 of each
    file. Raises PlanError if a file has another sha256 before the edit or is not in `pins`, or if too many bytes
    change, and CheckpointError if a file changes while it is read.
    """
    mine = group_by_file(splices)
    touched: dict[str, tuple[str, str]] = {}
    unknown: list[str] = []
    progress.start(sum(checkpoint.get_file(name).size for name in shards), "B", "hashing")
    try:
        for name, shard in shards.items():
            file = checkpoint.get_file(name)
            edits, header = mine.get(name, []), checkpoint.shards.get(name)
            if changed is not None and name in changes:
                touched[name] = changed.read(shard.file, file, edits, changes[name], progress, header)
            else:
                touched[name] = stream(shard.file, file, edits, progress.advance)
            shard.refuse_changed()
            digest = touched[name][0]
            check_digest(file, digest, pins)
            if name not in pins:
                unknown.append(f'"{name}": "{digest}"')
    finally:
        progress.close()
    if unknown:
        fault = "no sha256 of these files is known, so the edit could not be proved afterwards"
        raise PlanError(fault, checkpoint.root, f"if this is the right base, add base.sha256: {{{', '.join(unknown)}}}")
    return touched


def _hash_protected(
    checkpoint: Checkpoint,
    changes: Changes,
    changed: Changed | None,
    pins: dict[str, tuple[str, str]],
    progress: Progress,
) -> dict[str, tuple[str, str]]:
    """Read each file that only has protected regions, and return name -> (sha256, the same sha256).

    Raises PlanError if a digest differs from its pin.
    """
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(changes):
        if changed is None or any(change.op != "keep" for change in changes[name]) or name in changed.places:
            continue
        file = checkpoint.get_file(name)
        progress.start(file.size, "B", "hashing")
        try:
            with file.require_local().open() as opened:
                found[name] = changed.read(opened, file, (), changes[name], progress, checkpoint.shards.get(name))
        finally:
            progress.close()
        check_digest(file, found[name][0], pins)
    return found


def _refuse_changed(checkpoint: Checkpoint, touched: Collection[str]) -> None:
    """Raise CheckpointError if a file without edits was replaced or changed since it was listed."""
    for file in checkpoint.files:
        if file.entry and file.name not in touched and file.name not in OWN_FILES:
            file.entry.refuse_replaced()


def _refuse_changed_records(folder: Folder, checkpoint: Checkpoint, undo_name: str | None) -> None:
    """Raise CheckpointError if one of swsurgery's own files was changed or created since the files were listed."""
    listed = {file.name: file.entry for file in checkpoint.files}
    for name in (*OWN_FILES, undo_name) if undo_name else OWN_FILES:
        entry = listed.get(name)
        if entry:
            entry.refuse_replaced()
        elif filesystem.is_there(folder / name):
            raise CheckpointError(
                "another program wrote this file during the edit",
                folder / name,
                "run again when no other program writes there",
            )


def _refuse_shared(entry: Entry) -> None:
    """Raise TargetError for a file that has other hard links or is read-only."""
    with filesystem.convert_os_errors(entry):
        status = entry.stat()
    if status.st_nlink > 1:
        raise TargetError(
            f"the file has {status.st_nlink} hard links, so the edit would also change it under its other names",
            entry,
            "write a copy with -o",
        )
    if not status.st_mode & stat.S_IWUSR:
        raise TargetError("the file is read-only", entry, "write a copy with -o, or run chmod u+w on it")


def _describe_untouched(
    checkpoint: Checkpoint,
    touched: Collection[str],
    before: Record | None,
    pins: dict[str, tuple[str, str]],
    stated: Collection[str],
    progress: Progress,
) -> list[AppliedFile]:
    """Describe the files without splices.

    A file is hashed if it is small and contains no weights, or if its name is in `stated`: the manifest pins its
    digest. The digest of any other file is copied from the earlier record `before` and marked as unverified, or is None
    if `before` does not list the file with its present size.

    Raises PlanError if a digest differs from its pin.
    """
    found: list[AppliedFile] = []
    for file in checkpoint.files:
        if file.name in OWN_FILES or file.name in touched:
            continue
        record = before.files.get(file.name) if before else None
        large = file.size > SMALL_CHECKPOINT or file.name in {*checkpoint.shards, *checkpoint.copies}
        if large and file.name not in stated:
            digest = record.sha256 if record and record.size == file.size else None
            found.append(AppliedFile(file.name, file.size, digest, digest, "place", unverified=digest is not None))
            continue
        digest = hash_file(file.source, progress if large else None)
        check_digest(file, digest, pins)
        found.append(AppliedFile(file.name, file.size, digest, digest, "place"))
    return found
