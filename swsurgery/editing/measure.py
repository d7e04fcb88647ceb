"""Measure the statistics that rewrites need, before the first byte is copied."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing.rewrite import ProtectedRegion, Rewrite
from swsurgery.errors import Fault, NumberError, PlanError
from swsurgery.manifest.load import LoadedManifest
from swsurgery.progress import Progress, Silent
from swsurgery.storage.numeric import load_numpy

load_numpy()

from swsurgery.rewriting.function import Function, Source  # noqa: E402
from swsurgery.rewriting.read import build_function  # noqa: E402
from swsurgery.rewriting.rows import RegionRows, StoredMatrix  # noqa: E402
from swsurgery.rewriting.segments import RegionChange, list_segments, name_region  # noqa: E402
from swsurgery.rewriting.stored import Keep, RegionPlace, StoredRows  # noqa: E402
from swsurgery.storage.arrays import Words  # noqa: E402


def measure_changes(
    rewrites: Sequence[Rewrite],
    protected: Sequence[ProtectedRegion],
    checkpoint: Checkpoint,
    loaded: LoadedManifest,
    progress: Progress | None = None,
) -> dict[str, list[RegionChange]]:
    """Return the changes of each file with measured functions, and its protected regions, which are only hashed.

    The tensors are read once or a few times, if an operation needs statistics. Raises PlanError, with the position of
    the edit, if the statistics make an operation impossible, such as a clip that removes everything.
    """
    changes: dict[str, list[RegionChange]] = {}
    progress = progress or Silent()
    for group in _group_by_operation(rewrites):
        first = group[0]
        try:
            functions = _measure_group(group, checkpoint, progress)
            for rewrite, function in zip(group, functions, strict=True):
                order = (rewrite.number, rewrite.part)
                change = RegionChange(
                    rewrite.name, rewrite.op, rewrite.info, rewrite.start, rewrite.region, function, rewrite.kept, order
                )
                changes.setdefault(rewrite.file, []).append(change)
        except NumberError as error:
            position = loaded.describe_position(first.number)
            raise PlanError.of(
                Fault.parse(fault.add_context(f"cannot {first.op}"), position) for fault in error.faults
            ) from None
    for group_of_file in changes.values():
        list_segments(group_of_file)  # raises before anything is written
    for number, region in enumerate(protected):
        name = f"protected.{number}"
        kept = RegionChange(name, "keep", region.info, region.start, region.region, Keep(), order=(number, 0))
        changes.setdefault(region.file, []).append(kept)
    return changes


def _group_by_operation(rewrites: Sequence[Rewrite]) -> list[list[Rewrite]]:
    """Group the rewrites of each edit that share one function: those with the same options."""
    groups: dict[tuple[int, str], list[Rewrite]] = {}
    for rewrite in rewrites:
        groups.setdefault((rewrite.number, json.dumps(dict(rewrite.options), sort_keys=True)), []).append(rewrite)
    return list(groups.values())


def _measure_group(group: Sequence[Rewrite], checkpoint: Checkpoint, progress: Progress) -> list[Function]:
    """Return the measured function of each rewrite of a group."""
    first = group[0]
    if first.op == "restore":
        return [_make_restore(rewrite) for rewrite in group]
    function = build_function(first.op, first.options)
    meter = _Meter(progress, sum(rewrite.size for rewrite in group), f"measuring for {first.op}")
    try:
        measured = function.measure([make_source(rewrite, checkpoint, meter) for rewrite in group])
    finally:
        progress.close()
    return [measured] * len(group)


def _make_restore(rewrite: Rewrite) -> Function:
    assert rewrite.source is not None  # the planner finds it for every restore
    return StoredRows(rewrite.source.file, RegionPlace(rewrite.info, rewrite.source.start, rewrite.region))


def make_source(rewrite: Rewrite, checkpoint: Checkpoint, meter: _Meter | None = None) -> Source:
    """Return the source of statistics of a rewrite, which reads the region from the base."""
    file = checkpoint.shards[rewrite.file].file
    rows = RegionRows(StoredMatrix(rewrite.info, rewrite.start), rewrite.region)
    if len(rewrite.info.shape) == 1:  # a long vector is read in parts
        rows = RegionRows(StoredMatrix(rewrite.info, rewrite.start, flat=True), rewrite.region)

    def read() -> Iterator[Words]:
        for words in rows.read_all(file):
            yield words
            if meter:
                meter.count(rewrite.name, words.nbytes, rewrite.size)

    name, origin = name_region(rewrite.region, rewrite.info), tuple(begin for begin, _ in rewrite.region.bounds)
    return Source(name, rewrite.info.dtype, rewrite.region.shape, read, rewrite.kept, origin)


class _Meter:
    """Reports the first pass over each region to a Progress; some operations read a region more than once.

    The task of `total` bytes begins with the first byte, because many operations need no statistics.
    """

    def __init__(self, progress: Progress, total: int, label: str):
        self.progress, self.total, self.label = progress, total, label
        self.read: dict[str, int] = {}

    def count(self, name: str, size: int, limit: int) -> None:
        """Count bytes that were read of a region of `limit` bytes."""
        if not self.read:
            self.progress.start(self.total, "B", self.label)
        before = self.read.get(name, 0)
        self.read[name] = before + size
        self.progress.advance(max(min(size, limit - before), 0))
