"""Verify the changed and the protected regions of a record. Must not import the planner.

With the undo file, the old bytes of all regions are put back while a shard is read, and the digest of the result must
be that of the base's shard. The undo file is read in parts, so memory does not depend on its size. With the base, the
operations are computed again and compared byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import ChangeRecord, EditRecord, RegionRecord
from swsurgery.errors import CheckpointError, NumberError, PlanError, SwsurgeryError
from swsurgery.progress import Progress
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.files import BaseFile, LocalFile, fill, read_exactly
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.region import Region
from swsurgery.storage.shard import Shard, TensorInfo, open_shard
from swsurgery.storage.splice import Splice
from swsurgery.verifying.findings import Finding

load_numpy()

from swsurgery.rewriting import stored  # noqa: E402
from swsurgery.rewriting.function import Function, Source  # noqa: E402
from swsurgery.rewriting.read import build_function  # noqa: E402
from swsurgery.rewriting.rows import RegionRows, StoredMatrix  # noqa: E402
from swsurgery.rewriting.segments import RegionChange, list_segments, name_region  # noqa: E402
from swsurgery.rewriting.stored import Keep, RegionPlace, StoredRows  # noqa: E402
from swsurgery.rewriting.stream import Receivers, stream_changed  # noqa: E402
from swsurgery.rewriting.tally import Digests, Tally  # noqa: E402
from swsurgery.rewriting.undo import make_undo_function  # noqa: E402

Look = Callable[[int, bytes | bytearray], None]


@dataclass(frozen=True)
class RegionProof:
    """The regions of a record that fit the headers of the checkpoint, and what is wrong with the others.

    `changes` contains what is done to each file with regions to restore the base: the old bytes are put back, or,
    without an undo file, the regions are only hashed. A region that can be neither restored nor compared with a digest
    is left out, because nothing needs its bytes. `needs_base` contains the names of the files that cannot be restored.
    """

    entries: Mapping[str, RegionRecord]
    changes: Mapping[str, Sequence[RegionChange]]
    findings: tuple[Finding, ...]
    needs_base: frozenset[str] = field(default_factory=frozenset)


def read_regions(record: Record, checkpoint: Checkpoint, progress: Progress) -> RegionProof:
    """Match the regions of a record with the headers, and open the undo file.

    A missing or modified undo file, and one that does not fit the record, are findings.
    """
    findings: list[Finding] = []
    undo = None
    if record.undo and record.undo_name:
        undo, faults = _open_undo(record, checkpoint, progress)
        findings += faults
    entries: dict[str, RegionRecord] = {}
    changes: dict[str, list[RegionChange]] = {}
    needs_base: set[str] = set()
    for number, (name, entry) in enumerate(_list_entries(record)):
        place = find_place(entry, checkpoint)
        if place is None:
            if entry.file in checkpoint.shards or entry.file not in record.elsewhere:
                message = "the record names a region that the shards do not have"
                findings.append(Finding("registry", message, entry.file, entry.tensor))
            continue
        function: Function = Keep()
        if isinstance(entry, ChangeRecord):
            try:
                if undo is None or entry.undo is None:
                    needs_base.add(entry.file)
                else:
                    function = make_undo_function(undo, entry.undo, place)
            except CheckpointError as error:
                findings.append(Finding("registry", error.faults[0], record.undo_name))
                needs_base.add(entry.file)
        here = changes.setdefault(entry.file, [])
        op = "keep" if isinstance(function, Keep) else "restore"
        if op == "restore" or has_digest(entry):
            entries[name] = entry
            where = (place.info, place.start, place.region)
            here.append(RegionChange(name, op, *where, function, order=(number, 0), digested=has_digest(entry)))
    return RegionProof(entries, changes, (*findings, *_find_overlaps(record)), frozenset(needs_base))


def has_digest(entry: RegionRecord) -> bool:
    """Return True if a region has to match a digest of its own. A large changed region has none."""
    return entry.sha256 is not None or not isinstance(entry, ChangeRecord)


def _list_entries(record: Record) -> Iterator[tuple[str, RegionRecord]]:
    """Yield (name, region) of each changed region, and of each region that this or an earlier step protects."""
    for number, change in enumerate(record.changes):
        yield f"change.{number}", change
    for number, (_, protected) in enumerate(record.list_protected_regions()):
        yield f"protected.{number}", protected


def _find_overlaps(record: Record) -> Iterator[Finding]:
    """Yield a finding for each changed region that begins like an earlier one: restoring one would vouch for both."""
    seen: set[Region] = set()
    for change in record.changes:
        if change.region in seen:
            yield Finding("registry", "the record lists this region twice", change.file, change.tensor)
        seen.add(change.region)


def find_place(entry: RegionRecord, checkpoint: Checkpoint) -> RegionPlace | None:
    """Return the place of a recorded region; None if the headers have no such region of the recorded dtype."""
    shard = checkpoint.shards.get(entry.file)
    if shard is None or entry.region.scalars != entry.scalars:
        return None
    return stored.find_place(shard, entry.region, entry.dtype)


def _open_undo(record: Record, checkpoint: Checkpoint, progress: Progress) -> tuple[Shard | None, list[Finding]]:
    """Open the undo file of a record, and compare its size and sha256 with the record."""
    name, stated = record.undo_name, record.undo
    assert name is not None and stated is not None
    file = next((f for f in checkpoint.files if f.name == name), None)
    if file is None:
        return None, [Finding("file-missing", "the record lists this undo file, but it is missing", name)]
    if file.size != stated.size:
        message = f"the undo file has {file.size} bytes, but {stated.size} according to the record"
        return None, [Finding("digest", message, name)]
    digest = hash_file(file.source, progress) if file.is_here else file.digest
    if digest != stated.sha256:
        return None, [Finding("digest", f"the undo file's sha256 is {digest}, not {stated.sha256}", name)]
    try:
        return open_shard(file.source), []
    except CheckpointError as error:
        return None, [Finding("registry", f"the undo file is malformed: {error}", name)]


def hash_with_regions(
    file: BaseFile,
    edits: Sequence[EditRecord],
    proof: RegionProof,
    look: Look | None,
    progress: Progress,
) -> tuple[str, str, list[Finding]]:
    """Read a file once. Returns its sha256, its sha256 with the old bytes put back, and findings about its regions."""
    changes = proof.changes[file.name]
    tally = Tally(changes)
    with file.source.open() as opened:
        splices = _put_back(file, opened if isinstance(opened, LocalFile) else None, edits)
        here, restored = stream_changed(
            opened,
            file,
            splices,
            list_segments(changes),
            progress.advance,
            Receivers(observe=tally.observe, look=(lambda at, data: look(at, bytes(data))) if look else None),
        )
    return here, restored, list(_compare_digests(proof, tally.finish()))


def _put_back(file: BaseFile, opened: LocalFile | None, edits: Sequence[EditRecord]) -> list[Splice]:
    """Return splices that put back the old bytes of scalars, whatever the file contains there now."""
    splices: list[Splice] = []
    for edit in sorted(edits, key=lambda e: e.offset):
        old, end = edit.old_bytes, edit.offset + len(edit.old_bytes)
        if end <= file.size and (not splices or splices[-1].end <= edit.offset):
            now = read_exactly(opened or file.source, len(old), edit.offset)
            splices.append(Splice(file.name, edit.coordinate, DTYPES[edit.dtype], edit.offset, now, new=old))
    return splices


def _compare_digests(proof: RegionProof, found: Mapping[str, Digests]) -> Iterator[Finding]:
    """Compare the digests of regions with the record: those of the stored bytes, and those of restored old bytes."""
    for name, digests in found.items():
        entry = proof.entries[name]
        where = (entry.file, entry.tensor)
        hashed = has_digest(entry)
        if hashed and digests.base_sha256 != entry.sha256:
            rule = "edit-changed" if isinstance(entry, ChangeRecord) else "protected-changed"
            message = f"{entry.region} has the sha256 {digests.base_sha256}, not {entry.sha256}"
            yield Finding(rule, message, *where)
        if not isinstance(entry, ChangeRecord) or entry.file in proof.needs_base:
            continue
        if hashed and digests.sha256 != entry.base_sha256:
            message = f"the old bytes of {entry.region} have the sha256 {digests.sha256}, not {entry.base_sha256}"
            yield Finding("registry", message, *where)
        if digests.changed != entry.changed:
            message = f"{digests.changed} scalars of {entry.region} were changed, but {entry.changed} by the record"
            yield Finding("registry", message, *where)


def compare_by_recomputing(
    record: Record, checkpoint: Checkpoint, base: Checkpoint, progress: Progress
) -> list[Finding]:
    """Compute the changed regions again from the base, and compare every file with regions byte by byte.

    The bytes of "restore" come from a third checkpoint, so only their digests are checked.
    """
    findings: list[Finding] = []
    names = sorted({change.file for change in record.changes})
    try:
        changes = _measure_again(record, checkpoint, base)
    except (NumberError, PlanError, ValueError) as error:
        return [Finding("registry", f"the record's operations cannot be computed again: {error}")]
    files = {f.name: f for f in checkpoint.files}
    for name in names:
        theirs = next((f for f in base.files if f.name == name), None)
        ours = files.get(name)
        if theirs is None or ours is None or theirs.size != ours.size or name not in changes:
            findings.append(Finding("base", "the base's file has another size, header or tensors", name))
            continue
        findings += _compare_file(ours, theirs, record, changes[name], checkpoint.shards[name], progress)
    return findings


def _compare_file(
    ours: BaseFile,
    theirs: BaseFile,
    record: Record,
    changes: Sequence[RegionChange],
    shard: Shard,
    progress: Progress,
) -> Iterator[Finding]:
    """Yield a finding for each tensor, and for the header, in which a file differs from the recomputed one."""
    edits = [edit for edit in record.edits if edit.file == ours.name]
    different: set[str | None] = set()
    with ours.source.open() as patched, theirs.source.open() as opened:
        splices = [
            replace_new(splice, edit.new_bytes)
            for splice, edit in zip(
                _put_back(theirs, opened if isinstance(opened, LocalFile) else None, edits),
                sorted(edits, key=lambda e: e.offset),
                strict=True,
            )
        ]

        def compare(chunk: memoryview, at: int) -> None:
            buffer = bytearray(len(chunk))
            fill(patched, buffer, at)
            if buffer != chunk:
                different.update(_find_tensors(shard, at, buffer, chunk))

        try:
            segments = list_segments(changes)
            stream_changed(opened, theirs, splices, segments, progress.advance, Receivers(sink=compare))
        except SwsurgeryError as error:
            yield Finding("base", f"the edit cannot be computed again from the base: {error}", ours.name)
            return
    for tensor in sorted(different, key=str):
        message = "it is not what the record's operations make of the base"
        yield Finding("undeclared-change", message, ours.name, tensor)


def replace_new(splice: Splice, new: bytes) -> Splice:
    """Return a splice with other new bytes."""
    return Splice(splice.file, splice.coordinate, splice.dtype, splice.offset, splice.old, new=new)


def _find_tensors(shard: Shard, at: int, ours: bytearray, theirs: memoryview) -> Iterator[str | None]:
    """Yield the tensors whose bytes differ between two chunks at offset `at`; None for bytes outside of tensors."""
    end = at + len(ours)
    if at < shard.data_start:
        cut = min(end, shard.data_start) - at
        if ours[:cut] != theirs[:cut]:
            yield None
    for info in shard.tensors.values():
        begin, stop = (shard.data_start + offset for offset in info.data_offsets)
        if begin < end and stop > at:
            part = slice(max(begin - at, 0), min(stop, end) - at)
            if ours[part] != theirs[part]:
                yield info.name


def _measure_again(record: Record, checkpoint: Checkpoint, base: Checkpoint) -> dict[str, list[RegionChange]]:
    """Return the changes of each file, with functions measured on the base.

    Files whose headers differ from the base's are left out. Raises NumberError and ValueError for options that cannot
    be computed.
    """
    groups: dict[tuple[int, str], list[tuple[int, ChangeRecord, RegionPlace]]] = {}
    changes: dict[str, list[RegionChange]] = {}
    for number, entry in enumerate(record.changes):
        mine, theirs = checkpoint.shards.get(entry.file), base.shards.get(entry.file)
        place = find_place(entry, base)
        if mine is None or theirs is None or mine.header_sha256 != theirs.header_sha256 or place is None:
            continue
        options = json.dumps(entry.options, sort_keys=True)
        groups.setdefault((entry.edit, options), []).append((number, entry, place))
    for group in groups.values():
        first = group[0][1]
        kept = [list_kept(record, entry.region) for _, entry, _ in group]
        if first.op == "restore":
            functions: list[Function] = [
                StoredRows(checkpoint.shards[entry.file].file, place) for _, entry, place in group
            ]
        else:
            sources = [
                _make_source(base.shards[entry.file], place, keep)
                for (_, entry, place), keep in zip(group, kept, strict=True)
            ]
            functions = [build_function(first.op, first.options).measure(sources)] * len(group)
        for (number, entry, place), function, keep in zip(group, functions, kept, strict=True):
            change = RegionChange(
                f"change.{number}", entry.op, place.info, place.start, place.region, function, keep, (number, 0)
            )
            changes.setdefault(entry.file, []).append(change)
    return changes


def list_kept(record: Record, region: Region) -> tuple[int, ...]:
    """Return the flat indices in a region of the scalars that this step or an earlier one protects, rising."""
    kept: set[int] = set()
    points: Iterable[Coordinate] = record.map_protectors()
    areas = [Region.of_scalar(point) for point in points if region.contains(point)]
    areas += [entry.region for _, entry in record.list_protected_regions() if region.overlaps(entry.region)]
    for area in areas:
        kept.update(region.list_positions(region.intersect(area)))
    return tuple(sorted(kept))


def _make_source(shard: Shard, place: RegionPlace, kept: tuple[int, ...]) -> Source:
    info: TensorInfo = place.info
    rows = RegionRows(StoredMatrix(info, place.start, flat=len(info.shape) == 1), place.region)
    name = name_region(place.region, info)
    return Source(name, info.dtype, place.region.shape, lambda: rows.read_all(shard.file), kept)
