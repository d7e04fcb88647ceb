"""Read a file once and hash it twice: as stored, and with splices and changed regions.

`storage.pipeline.stream` does the same for splices alone. Changed regions are computed in segments. All other bytes are
read directly into the chunks that are written, so that a small change does not slow down the copy of its file.
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from swsurgery.rewriting.segments import RegionPart, Segment
from swsurgery.storage.arrays import Words
from swsurgery.storage.files import CHUNK, BaseFile, File, fill
from swsurgery.storage.hashing import count_threads, refuse_other_header
from swsurgery.storage.pipeline import Sink, apply_to_chunk
from swsurgery.storage.shard import Shard
from swsurgery.storage.splice import Splice
from swsurgery.threads import Pool

LARGE_SEGMENT = 8 << 20
"""Size in bytes above which only one segment is computed at a time, because several would need too much memory."""

_large = threading.Lock()
_by_offset = operator.attrgetter("offset")

Observe = Callable[[RegionPart, Words, Words], None]
"""Receives a part of a changed region, and its old and its new bit patterns."""


@dataclass(frozen=True)
class Receivers:
    """Who receives the bytes of a streamed file.

    `sink` gets (bytes, offset) of each chunk of the changed file. `place` gets (bytes, offset) of each changed segment,
    for a file that already contains all other bytes. `compare` gets (offset, old bytes, new bytes) of each changed
    segment. `observe` gets every changed part, in order, and `look` gets (offset, bytes) of the stored file. Each of
    them may be None.
    """

    sink: Sink | None = None
    place: Callable[[bytes, int], None] | None = None
    observe: Observe | None = None
    look: Callable[[int, memoryview], None] | None = None
    compare: Callable[[int, memoryview, memoryview], None] | None = None


def stream_changed(
    opened: File,
    file: BaseFile,
    splices: Sequence[Splice],
    segments: Sequence[Segment],
    advance: Callable[[int], None],
    receivers: Receivers,
    header: Shard | None = None,
) -> tuple[str, str]:
    """Read a file once. Returns the sha256 of its bytes, and the sha256 with the splices and segments changed.

    `splices` and `segments` are sorted by offset, and no splice is inside a changed region. Raises the errors of
    `storage.pipeline.stream`, and those of the functions of the segments.
    """
    with Pool(min(2, count_threads())) as lanes:
        run = _Run(file, lanes, receivers, header)
        for offset, size, segment in _divide(file.size, segments):
            first = bisect.bisect_left(splices, offset, key=_get_end)
            end = bisect.bisect_left(splices, offset + size, first, key=_by_offset)
            inside = splices[first:end]
            if segment is None:
                run.copy(opened, offset, size, inside)
            elif segment.size <= LARGE_SEGMENT:
                run.change(opened, segment, inside)
            else:
                with _large:
                    run.change(opened, segment, inside)
                    run.wait_for_segment()
            advance(size)
        return run.finish()


def _get_end(splice: Splice) -> int:
    return splice.end - 1


def _divide(size: int, segments: Sequence[Segment]) -> Iterator[tuple[int, int, Segment | None]]:
    """Yield (offset, size, segment) of each piece of a file. Pieces without a segment end where a chunk ends."""
    at = 0
    for segment in (*segments, None):
        until = segment.offset if segment else size
        while at < until:
            end = min(until, (at // CHUNK + 1) * CHUNK)
            yield at, end - at, None
            at = end
        if segment:
            yield at, segment.size, segment
            at += segment.size


class _Buffers:
    """`count` buffers that are used in turn, because new memory costs as much time as a pass over it.

    Larger segments than LARGE_SEGMENT get buffers of their own, which are not kept.
    """

    def __init__(self, count: int) -> None:
        self.buffers = [bytearray() for _ in range(count)]

    def take(self, size: int) -> memoryview:
        """Return a buffer of `size` bytes, with any content."""
        if size > LARGE_SEGMENT:
            return memoryview(bytearray(size))
        if size > len(self.buffers[0]):
            self.buffers[0] = bytearray(size)
        self.buffers.append(self.buffers.pop(0))
        return memoryview(self.buffers[-1])[:size]


class _Run:
    """The state of one pass over a file: two digests, and the chunk that is being filled."""

    def __init__(self, file: BaseFile, lanes: Pool, receivers: Receivers, header: Shard | None):
        self.file, self.lanes, self.receivers, self.header = file, lanes, receivers, header
        self.digest, self.patched = hashlib.sha256(), hashlib.sha256()
        self.begun = hashlib.sha256()
        self.changed = False
        self.skip = 0
        self.buffers = [memoryview(mmap.mmap(-1, CHUNK)), memoryview(mmap.mmap(-1, CHUNK))]
        self.filled, self.emitted = 0, 0
        self.olds, self.news = _Buffers(2), _Buffers(1)  # while one segment is hashed, the next one is read
        self.chunk_jobs: list[Future[None]] = []
        self.segment_jobs: list[Future[None]] = []

    def copy(self, opened: File, offset: int, size: int, splices: Sequence[Splice]) -> None:
        """Read a piece without a segment into the chunk."""
        piece = self.buffers[0][self.filled : self.filled + size]
        fill(opened, piece, offset)
        self.check_header(offset, piece)
        self.wait_for_segment()
        if splices:
            self.start_change()
        self.digest.update(piece)
        if self.receivers.look:
            self.receivers.look(offset, piece)
        apply_to_chunk(piece, offset, splices, self.file)
        self.filled += size
        if self.filled == CHUNK:
            self.emit()

    def change(self, opened: File, segment: Segment, splices: Sequence[Splice]) -> None:
        """Read a segment, compute its new bytes, and add them to the chunk."""
        old = self.olds.take(segment.size)
        fill(opened, old, segment.offset)
        self.wait_for_segment()
        self.start_change()
        self.segment_jobs = [self.lanes.submit(self.digest.update, old)]
        new = self.news.take(segment.size)
        parts = list(segment.compute(old, new))
        if self.receivers.look:
            self.receivers.look(segment.offset, old)
        if self.receivers.observe:
            self.segment_jobs.append(self.lanes.submit(self.observe, parts))
        apply_to_chunk(new, segment.offset, splices, self.file)
        if self.receivers.place:
            self.receivers.place(bytes(new), segment.offset)
        if self.receivers.compare:
            self.receivers.compare(segment.offset, old, new)
        self.add(new)

    def observe(self, parts: Sequence[tuple[RegionPart, Words, Words]]) -> None:
        """Pass the parts of a segment to the receiver."""
        assert self.receivers.observe is not None
        for part in parts:
            self.receivers.observe(*part)

    def add(self, data: memoryview) -> None:
        """Add bytes to the chunk, and pass on each chunk that becomes full."""
        while data:
            length = min(CHUNK - self.filled, len(data))
            self.buffers[0][self.filled : self.filled + length] = data[:length]
            self.filled += length
            data = data[length:]
            if self.filled == CHUNK:
                self.emit()

    def start_change(self) -> None:
        """Begin the second digest before the first change: until here, both files are equal."""
        if not self.changed:
            self.changed, self.skip = True, self.filled
            self.patched = self.digest.copy()

    def emit(self) -> None:
        """Hash and write the chunk in other threads, and continue with the other buffer."""
        for job in self.chunk_jobs:
            job.result()
        chunk = self.buffers[0][: self.filled]
        self.chunk_jobs = []
        if self.changed:
            self.chunk_jobs.append(self.lanes.submit(self.patched.update, chunk[self.skip :]))
            self.skip = 0
        if self.receivers.sink:
            self.chunk_jobs.append(self.lanes.submit(self.receivers.sink, chunk, self.emitted))
        self.emitted += self.filled
        self.buffers.reverse()
        self.filled = 0

    def wait_for_segment(self) -> None:
        """Wait until the bytes of the previous segment are hashed."""
        for job in self.segment_jobs:
            job.result()
        self.segment_jobs = []

    def check_header(self, offset: int, piece: memoryview) -> None:
        """Raise CheckpointError if the file has another header than the one of the plan."""
        if self.header and offset < self.header.data_start:
            self.begun.update(piece[: self.header.data_start - offset])
            if self.header.data_start <= offset + len(piece):
                refuse_other_header(self.begun.hexdigest(), self.header, self.file)

    def finish(self) -> tuple[str, str]:
        """Pass on the last chunk, and return both digests."""
        self.wait_for_segment()
        if self.filled:
            self.emit()
        for job in self.chunk_jobs:
            job.result()
        return self.digest.hexdigest(), (self.patched if self.changed else self.digest).hexdigest()
