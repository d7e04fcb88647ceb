"""Show a planned edit as a checkpoint whose shards are patched while they are read. Nothing is written.

A `PatchedFile` serves a shard of the base with the plan's splices and rewrites. Everything that reads tensors through
the `File` protocol can thus read the patched checkpoint before it exists.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing.plan import Plan
from swsurgery.progress import Progress
from swsurgery.storage.files import File, fill
from swsurgery.storage.splice import group_by_file

if TYPE_CHECKING:  # imports numpy, which only changes of regions need
    from swsurgery.rewriting.segments import Segment

CACHED_SEGMENTS = 4
"""Number of computed segments that each file remembers, each of about 4 MB. Reads are often smaller than a segment."""


class NewBytes(Protocol):
    """New bytes of a file, from `offset` to before `end`. A splice is one."""

    @property
    def offset(self) -> int:
        """Offset of the first byte."""
        ...

    @property
    def end(self) -> int:
        """Offset of the byte after the last one."""
        ...

    @property
    def new(self) -> bytes:
        """The new bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Replacement:
    """Bytes that are read instead of those in a file."""

    offset: int
    new: bytes = field(repr=False)

    @property
    def end(self) -> int:
        """Offset of the byte after the last one."""
        return self.offset + len(self.new)


class _Cache:
    """The segments of one file that were computed last. Several threads may use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.computed: OrderedDict[int, bytes] = OrderedDict()

    def find(self, offset: int) -> bytes | None:
        """Return the new bytes of the segment at `offset` if they are remembered."""
        with self.lock:
            return self.computed.get(offset)

    def put(self, offset: int, data: bytes) -> None:
        """Remember the new bytes of a segment, and forget the oldest one if there are too many."""
        with self.lock:
            self.computed[offset] = data
            if len(self.computed) > CACHED_SEGMENTS:
                self.computed.popitem(last=False)


@dataclass(frozen=True, eq=False)  # readers keep open files in a dict, so a file must have a hash
class PatchedFile:
    """A `File` with the bytes of `base` after the edit. `splices` and `segments` are sorted by offset."""

    base: File
    splices: Sequence[NewBytes] = field(repr=False)
    segments: Sequence[Segment] = field(default=(), repr=False)
    _cache: _Cache = field(default_factory=_Cache, repr=False, compare=False)

    def __str__(self) -> str:
        return str(self.base)

    @property
    def size(self) -> int:
        """Size in bytes, which is that of the base's file."""
        return self.base.size

    @contextlib.contextmanager
    def open(self) -> Iterator[PatchedFile]:
        """Keep the base's file open during the block."""
        with self.base.open() as opened:
            yield replace(self, base=opened)

    def readinto(self, buffer: memoryview, offset: int) -> int:
        """Read patched bytes into `buffer`; see `File.readinto`. Raises the errors of the rewrites' functions."""
        count = self.base.readinto(buffer, offset)
        view, end = buffer[:count], offset + count
        first = bisect.bisect_right(self.segments, offset, key=lambda s: s.offset + s.size)
        for segment in self.segments[first:]:
            if segment.offset >= end:
                break
            data = self._compute(segment)
            begin, stop = max(segment.offset, offset), min(segment.offset + segment.size, end)
            view[begin - offset : stop - offset] = data[begin - segment.offset : stop - segment.offset]
        first = bisect.bisect_right(self.splices, offset, key=lambda s: s.end)
        for splice in self.splices[first:]:
            if splice.offset >= end:
                break
            begin, stop = max(splice.offset, offset), min(splice.end, end)
            view[begin - offset : stop - offset] = splice.new[begin - splice.offset : stop - splice.offset]
        return count

    def _compute(self, segment: Segment) -> bytes:
        """Return the new bytes of a segment."""
        found = self._cache.find(segment.offset)
        if found is None:
            old = bytearray(segment.size)
            fill(self.base, old, segment.offset)
            new = bytearray(segment.size)
            for _ in segment.compute(old, new):
                pass
            found = bytes(new)
            self._cache.put(segment.offset, found)
        return found


def overlay_checkpoint(plan: Plan, progress: Progress | None = None) -> Checkpoint:
    """Return the base of a plan with shards that contain the bytes after the edit.

    The statistics of rewrites are measured first, which reads the tensors. The base must stay open and unchanged while
    the result is used. Raises PlanError if the statistics make an operation impossible.
    """
    checkpoint = plan.checkpoint
    splices = group_by_file(plan.splices)
    segments: dict[str, Sequence[Segment]] = {}
    if plan.rewrites:
        from swsurgery.editing.measure import measure_changes
        from swsurgery.rewriting.segments import list_segments

        changes = measure_changes(plan.rewrites, (), checkpoint, plan.loaded, progress)
        segments = {name: list_segments(group) for name, group in changes.items()}
    patched = {
        name: PatchedFile(checkpoint.shards[name].file, splices.get(name, ()), segments.get(name, ()))
        for name in plan.touched
    }
    return replace_shards(checkpoint, patched)


def replace_shards(checkpoint: Checkpoint, patched: Mapping[str, PatchedFile]) -> Checkpoint:
    """Return a checkpoint whose shards in `patched` are read from these files."""
    shards = {
        name: replace(shard, file=patched[name]) if name in patched else shard
        for name, shard in checkpoint.shards.items()
    }
    files = tuple(replace(f, source=patched[f.name], digest=None) if f.name in patched else f for f in checkpoint.files)
    return replace(checkpoint, shards=shards, files=files)
