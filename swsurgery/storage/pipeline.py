"""Read a file once, hash it with and without the edits of a plan, and pass its bytes on, all at the same time.

A file is read into a few buffers in turn. For each buffer, one thread computes the digest of the base, one the digest
of the patched file, and two write. An edit of one scalar is a Splice: its offset, its old bytes and its new bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import mmap
import operator
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from swsurgery.errors import CheckpointError
from swsurgery.progress import Progress, Silent
from swsurgery.storage.dtypes import format_bits
from swsurgery.storage.files import BaseFile, File, fill
from swsurgery.storage.hashing import count_cores, count_threads, refuse_other_header
from swsurgery.storage.shard import Shard
from swsurgery.storage.splice import Splice
from swsurgery.threads import Pool

BUFFER_SIZE = 2 << 20
"""Size of a buffer in bytes: one huge page of x86-64, so that a write past the cache has few pages to look up."""

MAX_BUFFERS = 12
"""Maximum number of buffers of all files that are copied at the same time, 24 MiB."""

WRITERS = 2
"""Number of threads that write one file. With one thread, the disk would have nothing to do between two writes."""

Sink = Callable[[memoryview, int], None]
"""Receives bytes of the patched file and their offset. It is called by several threads, in any order."""


@dataclass(frozen=True)
class Share:
    """What one of several files that are copied at the same time gets: `buffers` of BUFFER_SIZE bytes, and threads.

    If `apart` is False, the thread that reads also computes the digest of the base. This needs less processor time,
    because the bytes are still in the cache of that core.
    """

    buffers: int = 4
    apart: bool = True


def compute_share(files: int) -> Share:
    """Return the share of each file, if so many files are copied at the same time."""
    return Share(max(3, min(8, MAX_BUFFERS // max(1, files))), count_cores() > files)


def stream(
    opened: File,
    file: BaseFile,
    splices: Sequence[Splice],
    advance: Callable[[int], None],
    sink: Sink | None = None,
    header: Shard | None = None,
    share: Share = Share(),
) -> tuple[str, str]:
    """Read a file once. Returns the sha256 of its bytes and the sha256 of its bytes with `splices` applied.

    `opened` is the source of `file`, already open. `splices` must be sorted by offset and must not overlap. `sink`
    receives the bytes with the splices applied, and `advance` the number of bytes of each read. `share` states the
    buffers and threads to use. Raises CheckpointError if the file does not contain the old bytes of a splice, or if
    `header` is given and describes another header. Also raises the errors of `sink`.
    """
    parallel = file.size > BUFFER_SIZE and count_threads() > 1
    with contextlib.ExitStack() as started:
        run = _Pass(file, splices, sink, header)
        if parallel:
            run.start_threads(share, started)
        no_jobs: list[Future[None]] = []
        ring = deque((buffer, no_jobs) for buffer in _make_buffers(share.buffers if parallel else 1))
        for offset in range(0, file.size, BUFFER_SIZE):
            buffer, jobs = ring.popleft()
            _wait(jobs)
            chunk = buffer[: file.size - offset]
            fill(opened, chunk, offset)
            run.check_header(chunk, offset)
            ring.append((buffer, run.take(chunk, offset)))
            advance(len(chunk))
        for _, jobs in ring:
            _wait(jobs)
    return run.finish()


def hash_twice(file: BaseFile, splices: Sequence[Splice], progress: Progress | None = None) -> tuple[str, str]:
    """Return the sha256 of a file, and its sha256 with `splices` applied. Raises ShardError, CheckpointError."""
    progress = progress or Silent()
    progress.start(file.size, "B", "hashing")
    try:
        with file.source.open() as opened:
            return stream(opened, file, splices, progress.advance)
    finally:
        progress.close()


def _make_buffers(count: int) -> list[memoryview]:
    """Return buffers that are aligned to pages, as required for writes that bypass the page cache."""
    memory = mmap.mmap(-1, count * BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if count > 1:
        with contextlib.suppress(OSError, AttributeError):  # the kernel or the operating system has no huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    return [view[at : at + BUFFER_SIZE] for at in range(0, count * BUFFER_SIZE, BUFFER_SIZE)]


def _wait(jobs: Sequence[Future[None]]) -> None:
    """Wait until the threads no longer use a buffer. Raises the first of their errors."""
    for job in jobs:
        job.result()


class _Pass:
    """One pass over a file: both digests, and the threads that compute them and pass the bytes on.

    Until the first splice, the base and the patched file have the same bytes, so they share one digest.
    """

    def __init__(
        self,
        file: BaseFile,
        splices: Sequence[Splice],
        sink: Sink | None,
        header: Shard | None,
    ) -> None:
        self.file, self.splices, self.sink, self.header = file, splices, sink, header
        self.digest, self.patched = hashlib.sha256(), hashlib.sha256()
        self.begun = hashlib.sha256()
        self.changed = False
        self.writers = self.patched_lane = self.base_lane = Pool(0)

    def start_threads(self, share: Share, started: contextlib.ExitStack) -> None:
        """Start the threads that this file needs. Closing `started` waits for their work, then ends them."""
        if self.sink:
            self.writers = started.enter_context(Pool(WRITERS))
        if self.splices:
            self.patched_lane = started.enter_context(Pool(1, least=1))
        if share.apart:
            self.base_lane = started.enter_context(Pool(1, least=1))

    def take(self, chunk: memoryview, offset: int) -> list[Future[None]]:
        """Hash and pass on a chunk at `offset`. The buffer may be used again when the returned calls are complete."""
        first = bisect.bisect_left(self.splices, offset + 1, key=_get_end)
        inside = self.splices[first : bisect.bisect_left(self.splices, offset + len(chunk), first, key=_get_offset)]
        hashed = self.base_lane.submit(self.hash_base, chunk, offset, inside, bool(inside) and not self.changed)
        jobs = [hashed]
        ready = hashed if inside else None
        self.changed = self.changed or bool(inside)
        if self.changed:
            jobs.append(self.patched_lane.submit(self.hash_patched, chunk, ready))
        if self.sink:
            jobs.append(self.writers.submit(self.pass_on, self.sink, chunk, offset, ready))
        return jobs

    def hash_base(self, chunk: memoryview, offset: int, inside: Sequence[Splice], first: bool) -> None:
        """Hash a chunk of the base, and then apply the splices `inside` to it. In the `first` chunk, digests part."""
        if first:
            self.patched = self.digest.copy()
        self.digest.update(chunk)
        apply_to_chunk(chunk, offset, inside, self.file)

    def hash_patched(self, chunk: memoryview, ready: Future[None] | None) -> None:
        """Hash a chunk of the patched file, after `ready`: the call that applies its splices, or None."""
        if ready:
            ready.result()
        self.patched.update(chunk)

    def pass_on(self, sink: Sink, chunk: memoryview, offset: int, ready: Future[None] | None) -> None:
        """Pass a chunk of the patched file to the sink, after `ready`: the call that applies its splices, or None."""
        if ready:
            ready.result()
        sink(chunk, offset)

    def check_header(self, chunk: memoryview, offset: int) -> None:
        """Raise CheckpointError if the file has another header than the one of the plan."""
        if self.header and offset < self.header.data_start:
            self.begun.update(chunk[: self.header.data_start - offset])
            if self.header.data_start <= offset + len(chunk):
                refuse_other_header(self.begun.hexdigest(), self.header, self.file)

    def finish(self) -> tuple[str, str]:
        """Return both digests. All chunks must be hashed."""
        return self.digest.hexdigest(), (self.patched if self.changed else self.digest).hexdigest()


_get_offset, _get_end = operator.attrgetter("offset"), operator.attrgetter("end")


def apply_to_chunk(chunk: memoryview, offset: int, splices: Sequence[Splice], file: BaseFile) -> None:
    """Apply splices to a chunk that starts at `offset` in the file. The bytes of one scalar may be in two chunks.

    Raises CheckpointError if the chunk does not contain the old bytes of a splice.
    """
    for splice in splices:
        begin, end = max(splice.offset, offset), min(splice.end, offset + len(chunk))
        part, at = slice(begin - splice.offset, end - splice.offset), slice(begin - offset, end - offset)
        if chunk[at] != splice.old[part]:
            raise CheckpointError(
                f"{splice.coordinate} does not have the bits {format_bits(splice.old)} that the edit should replace",
                file.source,
                "run again when no other program writes to the base",
            )
        chunk[at] = splice.new[part]
