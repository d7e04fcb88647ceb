"""Divide the changed regions of a file into segments: whole rows of a tensor that are read and computed at once.

A segment never divides the rows that a function needs together. It is as small as that permits, and at most about
BAND_SIZE bytes otherwise.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from swsurgery.errors import PlanError
from swsurgery.rewriting.function import Function
from swsurgery.rewriting.rows import BAND_SIZE, Indices, RegionRows, Runs, StoredMatrix
from swsurgery.storage.arrays import Words
from swsurgery.storage.region import Region
from swsurgery.storage.shard import TensorInfo

MAX_SEGMENT = 48 << 20
"""Maximum size of a segment in bytes. Three copies of it fit into the memory that `apply` may use."""

WIDE = ("zero", "set", "scale", "prune_outliers", "restore", "keep")
"""Operations that treat every scalar alone, so that a one-dimensional tensor may be divided anywhere."""


def name_region(region: Region, info: TensorInfo) -> str:
    """Return the name of a tensor if the region is all of it, otherwise the region as text."""
    return info.name if region == Region.of_tensor(info) else str(region)


@dataclass(frozen=True, eq=False)
class RegionChange:
    """One region of a file that `function` changes.

    `name` identifies the region among all regions, and `order` sorts them as in the plan. `start` is the offset of the
    tensor's data in the file. `kept` contains the flat indices in the region of protected scalars, in rising order.
    `op` is the operation's name, or "keep" for a region that is only hashed. `digested` says whether the region gets
    digests of its own; None leaves that to `tally.has_digests`.
    """

    name: str
    op: str
    info: TensorInfo
    start: int
    region: Region
    function: Function = field(repr=False)
    kept: tuple[int, ...] = field(default=(), repr=False)
    order: tuple[int, int] = (0, 0)
    digested: bool | None = None

    @property
    def label(self) -> str:
        """Name of the region for its function, which messages contain: the tensor, or a part of it as a slice."""
        return name_region(self.region, self.info)

    @cached_property
    def kept_indices(self) -> Indices:
        """The protected scalars as an array."""
        return np.array(self.kept, np.int64)

    def compute(self, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the new bit patterns of a block whose first row is row `row` of the region; kept ones stay.

        They are written to `out`, which is another array than `words`, if it is given.
        """
        new = self.function.compute(self.label, self.info.dtype, row, words, out)
        if self.kept:
            first = row * words.shape[1]
            begin, end = np.searchsorted(self.kept_indices, [first, first + words.size])
            places = self.kept_indices[begin:end] - first
            new.reshape(-1)[places] = words.reshape(-1)[places]
        return new


@dataclass(frozen=True)
class RegionPart:
    """The part of a changed region in a segment: rows `runs` of the matrix, of which the first is row `row` of it."""

    change: RegionChange
    rows: RegionRows
    row: int
    runs: Runs


@dataclass(frozen=True)
class Segment:
    """Rows `begin` to before `end` of a matrix, and the parts of the changed regions in them."""

    matrix: StoredMatrix
    begin: int
    end: int
    parts: list[RegionPart] = field(default_factory=list, repr=False)

    @property
    def offset(self) -> int:
        """Offset of the first row in the file, in bytes."""
        return self.matrix.start + self.begin * self.matrix.row_size

    @property
    def size(self) -> int:
        """Size in bytes."""
        return (self.end - self.begin) * self.matrix.row_size

    def compute(
        self, old: bytearray | memoryview, new: bytearray | memoryview
    ) -> Iterator[tuple[RegionPart, Words, Words]]:
        """Compute the bytes of the segment from its bytes `old`, and store them in `new`, a buffer of the same size.

        Yields each part with the old and the new bit patterns (rows, columns) of its region, which may be views of the
        buffers.
        """
        before, after = self.matrix.view(old), self.matrix.view(new)
        if len(self.parts) == 1 and self._is_all(self.parts[0]):
            [part] = self.parts
            yield part, before, part.change.compute(part.row, before, after)
            return
        np.copyto(after, before)
        for part in self.parts:
            words = np.ascontiguousarray(part.rows.take(before, self.begin, part.runs))
            changed = part.change.compute(part.row, words)
            part.rows.put(after, self.begin, part.runs, changed)
            yield part, words, changed

    def _is_all(self, part: RegionPart) -> bool:
        """Return True if a part is the whole segment."""
        return part.runs == ((self.begin, self.end - self.begin),) and part.rows.width == self.matrix.columns


def list_segments(changes: Iterable[RegionChange], band: int = BAND_SIZE) -> list[Segment]:
    """Divide the changes of one file into segments, sorted by offset.

    Raises PlanError if the rows that a function needs together have more than MAX_SEGMENT bytes.
    """
    groups: dict[int, list[RegionChange]] = {}
    for change in changes:
        groups.setdefault(change.start, []).append(change)
    return [segment for start in sorted(groups) for segment in _divide(groups[start], band)]


def make_rows(changes: Sequence[RegionChange]) -> list[RegionRows]:
    """Return the rows of each change of one tensor."""
    first = changes[0]
    flat = len(first.info.shape) == 1 and all(change.op in WIDE for change in changes)
    matrix = StoredMatrix(first.info, first.start, flat)
    return [RegionRows(matrix, change.region) for change in changes]


def _divide(changes: Sequence[RegionChange], band: int) -> list[Segment]:
    """Divide the changes of one tensor into segments."""
    rows = make_rows(changes)
    matrix = rows[0].matrix
    heights = [1 if matrix.flat else change.function.find_height(change.region.shape) for change in changes]
    tall = [(one, height) for one, height in zip(rows, heights, strict=True) if height > 1]

    def may_end(row: int) -> bool:
        """Return True if no function needs rows before and after `row` together."""
        return all((count := one.count_before(row)) % height == 0 or count == one.total for one, height in tall)

    segments: list[Segment] = []
    step = max(1, band // max(matrix.row_size, 1))
    covered = _join((run for one in rows for run in one.runs), may_end)
    for begin, end in covered:
        while begin < end:
            cut = min(begin + step, end)
            cut = next((row for row in range(cut, begin, -1) if row == end or may_end(row)), cut)
            while cut < end and not may_end(cut):
                cut += 1
            segments.append(Segment(matrix, begin, cut))
            begin = cut
    if (largest := max((s.size for s in segments), default=0)) > MAX_SEGMENT:
        what = f"the operation needs {largest} bytes of {changes[0].info.name} at once, more than {MAX_SEGMENT}"
        raise PlanError(what, remedy="choose blocks with fewer rows")
    _fill(segments, changes, rows)
    return segments


def _join(runs: Iterable[tuple[int, int]], may_end: Callable[[int], bool]) -> list[tuple[int, int]]:
    """Merge runs of rows, as (first row, count), to intervals (begin, end) after which a segment may end."""
    intervals: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if intervals and (first <= intervals[-1][1] or not may_end(intervals[-1][1])):
            intervals[-1] = (intervals[-1][0], max(intervals[-1][1], first + count))
        else:
            intervals.append((first, first + count))
    return intervals


def _fill(segments: Sequence[Segment], changes: Sequence[RegionChange], rows: Sequence[RegionRows]) -> None:
    """Add to each segment the parts of the changes in its rows."""
    begins = [segment.begin for segment in segments]
    for change, one in zip(changes, rows, strict=True):
        parts: dict[int, list[tuple[int, int]]] = {}
        for first, count in one.runs:
            at, row, end = bisect.bisect_right(begins, first) - 1, first, first + count
            while row < end:
                stop = min(end, segments[at].end)
                parts.setdefault(at, []).append((row, stop - row))
                row, at = stop, at + 1
        for at, runs in parts.items():
            segments[at].parts.append(RegionPart(change, one, one.count_before(runs[0][0]), tuple(runs)))
