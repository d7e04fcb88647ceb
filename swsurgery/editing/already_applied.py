"""Report that a manifest was already applied in place: compare the manifest, its record and the files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Patched, Record
from swsurgery.checkpoint.record_entries import RegionRecord, ScalarRecord
from swsurgery.checkpoint.scalars import compare_scalar, find_repeated, list_protected
from swsurgery.editing.applied import Applied
from swsurgery.editing.copy_job import AppliedFile, Copied
from swsurgery.editing.recorded import explain_unlike_bases, find_unlike_records, find_unlike_regions
from swsurgery.editing.resolve import resolve
from swsurgery.editing.targets import find_known
from swsurgery.editing.undo import build_undo, build_undo_changes
from swsurgery.errors import CheckpointError
from swsurgery.known import own
from swsurgery.manifest.load import LoadedManifest
from swsurgery.progress import Progress
from swsurgery.storage import filesystem
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import BaseFile
from swsurgery.storage.folder import Folder
from swsurgery.storage.pipeline import hash_twice
from swsurgery.storage.splice import Splice, group_by_file

if TYPE_CHECKING:  # these modules import numpy, which only changes of regions need
    from swsurgery.rewriting.segments import RegionChange
    from swsurgery.rewriting.tally import Digests


def report_applied(
    folder: Folder, checkpoint: Checkpoint, loaded: LoadedManifest, patched: Patched, progress: Progress
) -> Applied:
    """Return the result for a manifest that an earlier run applied to the directory, so that nothing is written.

    Raises CheckpointError if the record does not contain exactly the edits of this manifest, or if the files do not
    agree with the record.
    """
    record = patched.record
    if record.changes and record.undo is None:
        what = "the manifest was already applied, but without the old bytes of its regions this cannot be checked"
        raise CheckpointError(what, folder.path, "run swsurgery verify --base BASE")
    repo_ids = (record.base.repo_id, (record.known or {}).get("hf_id"))
    for coordinate, fault in _find_differences(loaded, checkpoint, record, repo_ids):
        raise _make_not_applied_error(fault, folder.path if coordinate is None else f"{folder.path}: {coordinate}")
    for entry, fault in _find_other_scalars(record, checkpoint):
        raise _make_not_applied_error(fault, f"{entry.file}: {entry.coordinate}")
    mine, files = group_by_file(build_undo(record, checkpoint)), {f.name: f for f in checkpoint.files}
    changes = {name: [*group] for name, group in build_undo_changes(record, checkpoint).items()}
    protected = _add_protected(record, checkpoint, changes, folder)
    tallies: dict[str, Digests] = {}
    for name in sorted({*mine, *changes, *loaded.manifest.base.sha256}):
        file, stated = files.get(name), record.files.get(name)
        if file is None or stated is None:
            raise _make_not_applied_error("the file is missing", folder.path / name)
        here, restored = _hash(file, mine.get(name, []), changes.get(name, []), tallies, progress)
        if stated.sha256 not in (here, None) or stated.base_sha256 not in (restored, None):
            raise _make_not_applied_error("the file was changed later", file.source)
        if loaded.manifest.base.sha256.get(name, restored) != restored:
            raise _make_not_applied_error("the base of this file does not have the pinned sha256", file.source)
    for number, change in enumerate(record.changes):
        tally = tallies[f"undo.{number}"]
        if (tally.base_sha256, tally.sha256) != (change.sha256, change.base_sha256):
            raise _make_not_applied_error("the region does not have the recorded digests", change.region)
    for name, region in protected.items():
        if tallies[name].base_sha256 != region.sha256:
            raise _make_not_applied_error("the protected region was changed", region.region)
    with filesystem.convert_os_errors(folder):
        filesystem.sync_directory(folder)
    done = tuple(
        AppliedFile(n, r.size, r.base_sha256, r.sha256, "place", r.unverified) for n, r in record.files.items()
    )
    note = "the manifest was already applied; nothing was written"
    return Applied(folder.path, Copied(done), record, (note,), written=False, scalars=checkpoint.scalars)


def _find_differences(
    loaded: LoadedManifest, checkpoint: Checkpoint, record: Record, repo_ids: Collection[str | None]
) -> Iterator[tuple[Coordinate | None, str]]:
    """Yield each difference between a manifest and a record, as (scalar, fault).

    The scalar is None if the fault concerns the base, or an edit that does not fit the checkpoint.
    """
    base = loaded.manifest.base
    model = own.identify(base.model, (base.repo_id, checkpoint.repo_id, *repo_ids))
    resolution = resolve(loaded.manifest, checkpoint, partial(find_known, model))
    yield from ((None, misfit.explain()) for misfit in resolution.list_misfits())
    yield from ((None, fault) for _, fault in explain_unlike_bases(loaded.manifest, record))
    yield from find_unlike_records(resolution.group_by_coordinate(), record)
    yield from ((None, fault) for _, fault in find_unlike_regions(resolution.regions, record))


def _add_protected(
    record: Record, checkpoint: Checkpoint, changes: dict[str, list[RegionChange]], folder: Folder
) -> dict[str, RegionRecord]:
    """Add the regions that this step or an earlier one protects to the changes of their files, to be hashed.

    Returns the regions by the names of their changes. Raises CheckpointError if a region does not exist.
    """
    regions = record.list_protected_regions()
    if not regions:
        return {}
    from swsurgery.rewriting.segments import RegionChange
    from swsurgery.rewriting.stored import Keep, find_place

    found: dict[str, RegionRecord] = {}
    for number, (_, entry) in enumerate(regions):
        shard = checkpoint.shards.get(entry.file)
        place = find_place(shard, entry.region, entry.dtype) if shard else None
        if place is None:
            raise _make_not_applied_error("the record protects a region that does not exist", folder.path)
        name = f"protected.{number}"
        kept = RegionChange(name, "keep", place.info, place.start, place.region, Keep(), order=(number, 0))
        changes.setdefault(entry.file, []).append(kept)
        found[name] = entry
    return found


def _hash(
    file: BaseFile,
    splices: list[Splice],
    changes: list[RegionChange],
    tallies: dict[str, Digests],
    progress: Progress,
) -> tuple[str, str]:
    """Return the sha256 of a file, and that of the file with the edit undone. Adds the digests of its regions."""
    if not changes:
        return hash_twice(file, splices, progress)
    from swsurgery.editing.changed_bytes import hash_regions

    progress.start(file.size, "B", "hashing")
    try:
        with file.require_local().open() as opened:
            digests, found = hash_regions(opened, file, splices, changes, progress)
    finally:
        progress.close()
    tallies |= found
    return digests


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
