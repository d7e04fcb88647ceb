"""Read the scalars that edits of regions change, with their old and new bytes, for exports.

The scalars of a manifest are computed as `apply` computes them. Those of a patched checkpoint are read from its shards
and its undo files. Nothing is written. The number of scalars is limited, because a patch lists them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import ChangeRecord
from swsurgery.editing.overlay import PatchedFile
from swsurgery.editing.plan import Plan
from swsurgery.editing.undo import build_undo, build_undo_changes
from swsurgery.errors import CheckpointError, PlanError
from swsurgery.manifest.patch import MAX_SCALARS, PatchScalar, choose_operation
from swsurgery.progress import Progress
from swsurgery.storage.files import File, fill
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.region import Region
from swsurgery.storage.splice import group_by_file

load_numpy()

import numpy as np  # noqa: E402

from swsurgery.editing.measure import measure_changes  # noqa: E402
from swsurgery.rewriting.rows import RegionRows, StoredMatrix  # noqa: E402
from swsurgery.rewriting.segments import RegionChange, RegionPart, list_segments  # noqa: E402
from swsurgery.rewriting.stored import Keep  # noqa: E402
from swsurgery.rewriting.tally import Tally  # noqa: E402
from swsurgery.storage.arrays import Words  # noqa: E402


@dataclass
class _Collector:
    """The changed scalars found so far. `where` is the place of the edits, for the message about too many of them."""

    where: object
    found: dict[tuple[str, int], PatchScalar] = field(default_factory=dict)

    def add(self, file: str, op: str, part: RegionPart, old: Words, new: Words) -> None:
        """Add the scalars of a part of a region whose bits differ. Raises PlanError if there are too many."""
        before, after = old.reshape(-1), new.reshape(-1)
        places = np.flatnonzero(before != after).astype(np.int64)
        if len(self.found) + len(places) > MAX_SCALARS:
            raise refuse_many(self.where)
        info = part.change.info
        flat = part.rows.find_flat(part.row, places).tolist() if len(places) else []
        for position, was, now in zip(flat, before[places], after[places], strict=True):
            was_bytes, now_bytes = was.tobytes(), now.tobytes()
            done = choose_operation(op, info.dtype, now_bytes)
            scalar = PatchScalar(info.name, info.shape, info.dtype, position, file, was_bytes, now_bytes, done)
            self.found[info.name, position] = scalar


def refuse_many(where: object) -> PlanError:
    """Make the error for edits that change more scalars than an export may contain."""
    what = f"the edits change more than {MAX_SCALARS} scalars, the most that an export lists one by one"
    return PlanError(what, where, "share the manifest, or publish the patched checkpoint")


def read_planned(plan: Plan, progress: Progress) -> list[PatchScalar]:
    """Compute the scalars that the rewrites of a plan change. Reads the regions from the base.

    Raises PlanError for too many of them, and as `measure_changes` does.
    """
    if not plan.rewrites:
        return []
    collector = _Collector(plan.loaded.path)
    changes = measure_changes(plan.rewrites, (), plan.checkpoint, plan.loaded, progress)
    for file, group in changes.items():
        with plan.checkpoint.shards[file].file.open() as opened:
            for segment in list_segments(group):
                old = bytearray(segment.size)
                fill(opened, old, segment.offset)
                for part, before, after in segment.compute(old, bytearray(segment.size)):
                    collector.add(file, "zero" if part.change.op == "zero" else "set", part, before, after)
    return [*collector.found.values()]


def read_recorded(steps: Sequence[Record], checkpoint: Checkpoint) -> list[PatchScalar]:
    """Read the scalars of regions that differ between a patched checkpoint and its first base.

    `steps` are the records of all steps, the earliest first. Raises CheckpointError if an undo file is missing, or if a
    region differs from its record; PlanError for too many scalars, or if the old bytes were not stored.
    """
    for record in steps:
        if record.changes and record.undo is None:
            what = "the old bytes of a changed region are not stored, because they exceeded the undo limit"
            raise PlanError(what, checkpoint.root, "export its manifest.yaml with --base instead")
    if len(steps) == 1 and sum(change.changed for change in steps[0].changes) > MAX_SCALARS:
        raise refuse_many(checkpoint.root)
    _refuse_other_files(steps, checkpoint)
    before: dict[str, File] = {}
    for record in reversed(steps):
        _undo_step(record, checkpoint, before)
    collector = _Collector(checkpoint.root)
    for file, group in _list_regions(steps, checkpoint).items():
        with checkpoint.shards[file].file.open() as patched, before[file].open() as base:
            for segment in list_segments(group):
                old, new = bytearray(segment.size), bytearray(segment.size)
                fill(base, old, segment.offset)
                fill(patched, new, segment.offset)
                for part in segment.parts:
                    views = (segment.matrix.view(data) for data in (old, new))
                    was, now = (part.rows.take(view, segment.begin, part.runs) for view in views)
                    collector.add(file, "set", part, was, now)
    return [*collector.found.values()]


def _refuse_other_files(steps: Sequence[Record], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a file with a region that has no digest of its own has another sha256 than recorded.

    Local files are hashed; of a file on the Hub, the sha256 is the one that the Hub lists, if it lists one.
    """
    large = {entry.file for record in steps for entry in record.changes if entry.sha256 is None}
    for name in sorted(large & {*checkpoint.shards} & {*steps[-1].files}):
        file = checkpoint.get_file(name)
        digest = hash_file(file.source) if file.is_here or file.digest is None else file.digest
        if digest != steps[-1].files[name].sha256:
            raise CheckpointError("the file differs from its record", file.source, "run swsurgery verify")


def _undo_step(record: Record, checkpoint: Checkpoint, views: dict[str, File]) -> None:
    """Replace the views of the files that a step changed by views of the files before this step.

    `views` maps the name of a file to its contents after the step; a file that is missing is as it is stored. Raises
    CheckpointError if a region differs from the record.
    """
    changes, splices = build_undo_changes(record, checkpoint), group_by_file(build_undo(record, checkpoint))
    for file in {*changes, *splices}:
        group = changes.get(file, [])
        segments = list_segments(group)
        after = views.get(file, checkpoint.shards[file].file)
        tally = Tally(group)
        with after.open() as opened:
            for segment in segments:
                data = bytearray(segment.size)
                fill(opened, data, segment.offset)
                for part, new, old in segment.compute(data, bytearray(segment.size)):
                    tally.observe(part, new, old)
        digests = tally.finish()
        for change in group:
            entry, found = record.changes[change.order[0]], digests[change.name]
            if (found.base_sha256, found.sha256) != (entry.sha256, entry.base_sha256):
                where = f"{entry.region} in {entry.file}"
                raise CheckpointError("the stored region differs from its record", where, "run swsurgery verify")
        views[file] = PatchedFile(after, splices.get(file, ()), segments)


def _list_regions(steps: Iterable[Record], checkpoint: Checkpoint) -> dict[str, list[RegionChange]]:
    """Return the regions that any step changed, by file; a region that several steps changed only once."""
    regions: dict[Region, ChangeRecord] = {entry.region: entry for record in steps for entry in record.changes}
    groups: dict[str, list[RegionChange]] = {}
    for number, (region, entry) in enumerate(regions.items()):
        shard = checkpoint.shards[entry.file]
        info = shard.tensors[region.tensor]
        start = shard.data_start + info.data_offsets[0]
        change = RegionChange(f"region.{number}", "keep", info, start, region, Keep(), order=(number, 0))
        groups.setdefault(entry.file, []).append(change)
    return groups


def count_negative_zeros(checkpoint: Checkpoint, tensor: str) -> int:
    """Count the scalars of a tensor that are -0.0: those in which only the sign bit is set."""
    info = checkpoint.get_info(tensor)
    if info.dtype.name.endswith("FNUZ"):
        return 0  # these dtypes have no -0.0
    shard = checkpoint.shards[checkpoint.weight_map[tensor]]
    rows = RegionRows(StoredMatrix(info, shard.data_start + info.data_offsets[0]), Region.of_tensor(info))
    sign = 1 << info.dtype.bits - 1
    return sum(int(np.count_nonzero(words == sign)) for words in rows.read_all(shard.file))
