"""Apply and revert in the directory of the base: write a few bytes of each shard with edits, and copy nothing.

After the edit the base no longer exists, so its digests are checked before the edit: each shard with edits is hashed
once, and the manifest or an earlier record must state the same digest. `checkpoint/journal.py` keeps the old bytes
until the edit is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from swsurgery.checkpoint import journal
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import is_cache_snapshot
from swsurgery.checkpoint.opening import held_for_editing, read_checkpoint
from swsurgery.checkpoint.record import Patched, Record, ScalarRecord, find_record, read_record
from swsurgery.checkpoint.scalars import compare_scalar, find_repeated, list_protected
from swsurgery.editing.applied import SMALL_CHECKPOINT, Applied
from swsurgery.editing.base import collect_known_digests
from swsurgery.editing.copy_job import AppliedFile, Copied, compute_record_mode
from swsurgery.editing.pins import check_left_out
from swsurgery.editing.plan import make_plan
from swsurgery.editing.record import complete_record, draft_record
from swsurgery.editing.recorded import explain_unlike_bases, find_unlike_records
from swsurgery.editing.resolve import resolve
from swsurgery.editing.sanity import CheckOptions, combine_bounds, run_check
from swsurgery.editing.targets import find_known
from swsurgery.editing.undo import build_undo, list_reversion_notes
from swsurgery.errors import CheckpointError, PlanError, TargetError
from swsurgery.hub import Uri
from swsurgery.known import own
from swsurgery.manifest.load import LoadedManifest
from swsurgery.progress import Progress, Reporter
from swsurgery.storage import filesystem
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.hashing import check_digest, hash_file, hash_twice, stream
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.splice import Splice, group_by_file


def apply_in_place(loaded: LoadedManifest, base: Path | Uri, check: CheckOptions, reporter: Reporter) -> Applied:
    """Turn the base itself into the patched checkpoint with its record; restore the base after an error.

    If this manifest was the last one applied to the directory, nothing is written.

    Raises CheckpointError, PlanError, ModelError; TargetError if the directory or a file in it must not be written;
    CheckFailed if the patched checkpoint fails the check.
    """
    root = _find_directory(base)
    with held_for_editing(root) as (folder, _), contextlib.ExitStack() as opened:
        checkpoint = read_checkpoint(folder, loaded.manifest.base)
        previous = find_record(checkpoint)
        if previous and previous.record.manifest_sha256 == hashlib.sha256(loaded.raw).hexdigest():
            found = _report_applied(folder, checkpoint, loaded, previous, reporter)
            reporter.say(*found.notes)
            return found
        plan = make_plan(loaded, checkpoint)
        if plan.rewrites or plan.protected_regions:
            what = "an edit in place changes only single scalars, but this manifest names regions"
            raise PlanError(what, loaded.path, "apply with -o")
        if plan.omitted:
            raise PlanError("an edit in place cannot leave files out", ", ".join(plan.omitted), "set base.copies: keep")
        combine_bounds(plan, check)  # raises before anything is hashed or written
        draft = draft_record(plan)
        for note in plan.notes:
            reporter.say(note)
        pins = collect_known_digests(plan)
        check_left_out(plan, {f.name for f in plan.checkpoint.files} - {*OWN_FILES}, pins, reporter)
        shards = _open_shards(folder, plan.checkpoint, plan.splices, opened)
        touched = _hash_touched(plan.checkpoint, shards, plan.splices, pins, reporter)
        stated = loaded.manifest.base.sha256
        before = previous.record if previous else None
        rest = _describe_untouched(plan.checkpoint, touched, before, pins, stated, reporter)
        edited = [
            AppliedFile(name, plan.checkpoint.get_file(name).size, *both, "place") for name, both in touched.items()
        ]
        copied = Copied(tuple(sorted([*edited, *rest], key=lambda f: f.name)))
        _refuse_changed(checkpoint, touched)
        _refuse_changed_records(folder, checkpoint)
        with journal.apply_splices(folder, shards, plan.splices, mode=compute_record_mode(checkpoint.files)) as own:
            result = run_check(plan, folder, check, reporter, reporter.say)
            record = complete_record(draft, copied, result)
            own |= Patched(record, record.render(), loaded.raw).render_own_files()
            _refuse_changed(checkpoint, touched)
    return Applied(folder.path, copied, record, plan.notes)


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
        if record.changes:
            what = "the edit changed regions, and a reversion in place restores only single scalars"
            raise CheckpointError(what, root, "revert with -o")
        checkpoint = read_checkpoint(folder, record.base)
        if hashlib.sha256(patched.manifest_raw).hexdigest() != record.manifest_sha256:
            raise CheckpointError(
                "the manifest was changed since it was applied, and revert would delete it",
                root / OWN_FILES[1],
                "move it away",
            )
        splices = build_undo(record, checkpoint)
        names = {f.name: f.size for f in checkpoint.files}
        if wrong := [name for name, entry in record.files.items() if names.get(name) != entry.size]:
            raise CheckpointError(
                f"cannot revert, because these files were changed or removed since the edit: {', '.join(wrong)}",
                root,
                "restore them",
            )
        pins = {name: (entry.sha256, "its record") for name, entry in record.files.items() if entry.sha256}
        shards = _open_shards(folder, checkpoint, splices, opened)
        touched = _hash_touched(checkpoint, shards, splices, pins, progress)
        _describe_untouched(checkpoint, touched, record, pins, (), progress)
        for name, (_, restored) in touched.items():
            if restored != record.files[name].base_sha256:
                raise CheckpointError(
                    "reverting this file would not restore the base, because the record was changed", root / name
                )
        _refuse_changed(checkpoint, touched)
        _refuse_changed_records(folder, checkpoint)
        with journal.apply_splices(
            folder, shards, splices, reverts=True, mode=compute_record_mode(checkpoint.files)
        ) as own:
            own |= previous.render_own_files() if previous else dict.fromkeys(OWN_FILES)
            _refuse_changed(checkpoint, touched)
    return list_reversion_notes(record)


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
    folder: Folder, checkpoint: Checkpoint, splices: tuple[Splice, ...], opened: contextlib.ExitStack
) -> dict[str, journal.OpenShard]:
    """Open each file with splices once, for hashing and for writing.

    Raises TargetError for a file that must not be written, and CheckpointError for a file that was replaced.
    """
    shards: dict[str, journal.OpenShard] = {}
    for name in sorted({s.file for s in splices}):
        file = checkpoint.get_file(name)
        entry = file.entry
        if entry is None or entry.folder is not folder:
            raise TargetError("the file is not in the directory to edit", file.source)
        _refuse_shared(entry)
        shards[name] = journal.OpenShard(entry)
        opened.callback(shards[name].close)
    return shards


def _hash_touched(
    checkpoint: Checkpoint,
    shards: dict[str, journal.OpenShard],
    splices: tuple[Splice, ...],
    pins: dict[str, tuple[str, str]],
    progress: Progress,
) -> dict[str, tuple[str, str]]:
    """Read each file with splices once, and return name -> (sha256 before the splices, sha256 after them).

    Nothing is written. `pins` contains the required sha256 of each file. Raises PlanError if a file has another sha256
    before the splices or is not in `pins`, and CheckpointError if a file changes while it is read.
    """
    mine = group_by_file(splices)
    touched: dict[str, tuple[str, str]] = {}
    unknown: list[str] = []
    progress.start(sum(checkpoint.get_file(name).size for name in shards), "B", "hashing")
    try:
        for name, shard in shards.items():
            file = checkpoint.get_file(name)
            touched[name] = stream(shard.file, file, mine[name], progress.advance)
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


def _refuse_changed(checkpoint: Checkpoint, touched: Collection[str]) -> None:
    """Raise CheckpointError if a file without edits was replaced or changed since it was listed."""
    for file in checkpoint.files:
        if file.entry and file.name not in touched and file.name not in OWN_FILES:
            file.entry.refuse_replaced()


def _refuse_changed_records(folder: Folder, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if one of swsurgery's own files was changed or created since the files were listed."""
    listed = {file.name: file.entry for file in checkpoint.files}
    for name in OWN_FILES:
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
            "apply with -o",
        )
    if not status.st_mode & stat.S_IWUSR:
        raise TargetError("the file is read-only", entry, "apply with -o, or run chmod u+w on it")


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


def _report_applied(
    folder: Folder, checkpoint: Checkpoint, loaded: LoadedManifest, patched: Patched, progress: Progress
) -> Applied:
    """Return the result for a manifest that an earlier run applied to the directory, so that nothing is written.

    Raises CheckpointError if the record does not contain exactly the edits of this manifest, or if the files do not
    agree with the record.
    """
    record = patched.record
    if record.changes or record.protected_regions:
        what = "the manifest was already applied; an edit in place cannot check its regions"
        raise CheckpointError(what, folder.path, "run swsurgery verify")
    repo_ids = (record.base.repo_id, (record.known or {}).get("hf_id"))
    for coordinate, fault in _find_differences(loaded, checkpoint, record, repo_ids):
        raise _make_not_applied_error(fault, folder.path if coordinate is None else f"{folder.path}: {coordinate}")
    for entry, fault in _find_other_scalars(record, checkpoint):
        raise _make_not_applied_error(fault, f"{entry.file}: {entry.coordinate}")
    mine, files = group_by_file(build_undo(record, checkpoint)), {f.name: f for f in checkpoint.files}
    for name in sorted({*mine, *loaded.manifest.base.sha256}):
        file, stated = files.get(name), record.files.get(name)
        if file is None or stated is None:
            raise _make_not_applied_error("the file is missing", folder.path / name)
        here, restored = hash_twice(file, mine.get(name, []), progress)
        if stated.sha256 not in (here, None) or stated.base_sha256 not in (restored, None):
            raise _make_not_applied_error("the file was changed later", file.source)
        if loaded.manifest.base.sha256.get(name, restored) != restored:
            raise _make_not_applied_error("the base of this file does not have the pinned sha256", file.source)
    with filesystem.convert_os_errors(folder):
        filesystem.sync_directory(folder)
    done = tuple(
        AppliedFile(n, r.size, r.base_sha256, r.sha256, "place", r.unverified) for n, r in record.files.items()
    )
    note = "the manifest was already applied; nothing was written"
    return Applied(folder.path, Copied(done), record, (note,), written=False)


def _find_differences(
    loaded: LoadedManifest, checkpoint: Checkpoint, record: Record, repo_ids: Collection[str | None]
) -> Iterator[tuple[Coordinate | None, str]]:
    """Yield each difference between a manifest and a record, as (scalar, fault).

    The scalar is None if the fault concerns the base, or an edit that does not fit the checkpoint.
    """
    base = loaded.manifest.base
    model = own.identify(base.model, (base.repo_id, checkpoint.repo_id, *repo_ids))
    resolution = resolve(loaded.manifest, checkpoint, partial(find_known, model))
    yield from ((None, fault) for _, fault in resolution.list_misfits())
    yield from ((None, fault) for _, fault in explain_unlike_bases(loaded.manifest, record))
    yield from find_unlike_records(resolution.group_by_coordinate(), record)


def _find_other_scalars(record: Record, checkpoint: Checkpoint) -> Iterator[tuple[ScalarRecord, str]]:
    """Yield (recorded scalar, fault) for each scalar that the checkpoint stores differently or that is recorded twice.

    Scalars that an earlier step protects are compared too.
    """
    for entry in (*record.edits, *list_protected(record, checkpoint)):
        if fault := compare_scalar(entry, checkpoint):
            yield entry, fault.message
    for entry in find_repeated(record):
        yield entry, "the record lists this scalar twice"


def _make_not_applied_error(what: str, where: object) -> CheckpointError:
    """Build the error for a record that does not match the manifest or the files."""
    fault = f"the record says that this manifest was applied; however, {what}"
    return CheckpointError(fault, where, "run swsurgery verify")
