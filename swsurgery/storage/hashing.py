"""Hash files in one pass, with and without the edits of a plan, and compare digests with expected ones.

An edit of one scalar is a Splice: its offset, its old bytes and its new bytes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import mmap
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from swsurgery.errors import CheckpointError, PlanError, SwsurgeryError
from swsurgery.progress import Progress, Silent
from swsurgery.storage.dtypes import format_bits
from swsurgery.storage.files import CHUNK, BaseFile, File, fill
from swsurgery.storage.shard import Shard
from swsurgery.storage.splice import Splice
from swsurgery.threads import Pool

THREADS_VARIABLE = "SWSURGERY_THREADS"
"""Environment variable that sets how many files are copied at a time. If it is 1, only one thread is used."""


def stream(
    opened: File,
    file: BaseFile,
    splices: Sequence[Splice],
    advance: Callable[[int], None],
    sink: Callable[[memoryview], None] | None = None,
    header: Shard | None = None,
) -> tuple[str, str]:
    """Read a file once. Returns the sha256 of its bytes and the sha256 of its bytes with `splices` applied.

    `opened` is the source of `file`, already open. `splices` must be sorted by offset and must not overlap. `sink`
    receives the bytes with the splices applied, in chunks, and `advance` the size of each chunk. Raises CheckpointError
    if the file does not contain the old bytes of a splice, or if `header` is given and describes another header. Also
    raises the errors of `sink`.
    """
    digest, patched = hashlib.sha256(), None
    begun, header_end = hashlib.sha256(), header.data_start if header else 0
    jobs: list[Future[None]] = []
    first = 0
    with Pool(min(2, count_threads())) as lanes:  # one thread writes, the other hashes what is written
        for offset, chunk in _read_chunks(opened, file.size):
            if header and offset < header_end:
                begun.update(chunk[: header_end - offset])
                if header_end <= offset + len(chunk):
                    refuse_other_header(begun.hexdigest(), header, file)
            while first < len(splices) and splices[first].end <= offset:
                first += 1
            end = bisect.bisect_left(splices, offset + len(chunk), first, key=_by_offset)
            inside = splices[first:end]
            if inside and patched is None:
                patched = digest.copy()  # base and patched file are equal up to this point
            if inside:
                digest.update(chunk)
                apply_to_chunk(chunk, offset, inside, file)
            for job in jobs:  # wait for the previous chunk, because its buffer is filled next
                job.result()
            jobs = [lanes.submit(patched.update, chunk)] if patched is not None else []
            if sink is not None:
                jobs.append(lanes.submit(sink, chunk))
            if not inside:
                digest.update(chunk)
            advance(len(chunk))
        for job in jobs:
            job.result()
    return digest.hexdigest(), (patched or digest).hexdigest()


_by_offset = operator.attrgetter("offset")


def hash_file(file: File, progress: Progress | None = None, what: str = "hashing") -> str:
    """Compute the sha256 of a file; `what` is the label of the progress bar. Raises ShardError, SwsurgeryError."""
    progress, digest = progress or Silent(), hashlib.sha256()
    with file.open() as opened:
        size = opened.size
        progress.start(size, "B", what)
        try:
            for _, chunk in _read_chunks(opened, size):
                digest.update(chunk)
                progress.advance(len(chunk))
        finally:
            progress.close()
    return digest.hexdigest()


def hash_twice(file: BaseFile, splices: Sequence[Splice], progress: Progress | None = None) -> tuple[str, str]:
    """Return the sha256 of a file, and its sha256 with `splices` applied. Raises ShardError, CheckpointError."""
    progress = progress or Silent()
    progress.start(file.size, "B", "hashing")
    try:
        with file.source.open() as opened:
            return stream(opened, file, splices, progress.advance)
    finally:
        progress.close()


def check_digest(file: BaseFile, digest: str, pins: dict[str, tuple[str, str]]) -> None:
    """Compare the digest of a file of the base with the expected digest and with the digest that the Hub states.

    `pins` maps a file name to the expected digest and the place that states it, such as "its record". A missing digest
    is not compared. Raises PlanError if a digest differs.
    """
    for wanted, who in (pins.get(file.name, (None, "")), (file.digest, "its blob's name")):
        if wanted and wanted != digest:
            changed = f"{file.name} was changed since the edit: restore it, or give the unchanged checkpoint"
            remedy = changed if who == "its record" else "is this the right checkpoint?"
            raise PlanError(f"its sha256 is {digest}, but {who} says {wanted}", file.source, remedy)


def refuse_other_header(digest: str, header: Shard, file: BaseFile) -> None:
    """Raise CheckpointError if a file's header changed since the edits were planned with `header`.

    `digest` is the sha256 of the bytes before the data section, as `header.header_sha256`.
    """
    if digest != header.header_sha256:
        reason = "does not have the header that the edits were planned with"
        raise CheckpointError(reason, file.source, "run again when no other program writes to the base")


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


def count_threads() -> int:
    """Read the number of threads from the environment variable SWSURGERY_THREADS. The default is 4.

    The default exceeds the number of cores of a small machine, so that no core is idle while the last shard is copied.
    Raises SwsurgeryError if the value is not a number from 1 to 64.
    """
    text = os.environ.get(THREADS_VARIABLE, "4")
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        what = f"{THREADS_VARIABLE} is {text!r}, not a number from 1 to 64"
        raise SwsurgeryError(what, "the environment", "change or unset it")
    return int(text)


def _read_chunks(file: File, size: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) for each chunk of a file of `size` bytes. Raises CheckpointError.

    Two buffers are used alternately. They are aligned to pages, as required for writes that bypass the page cache.
    """
    buffers = itertools.cycle([memoryview(mmap.mmap(-1, CHUNK)), memoryview(mmap.mmap(-1, CHUNK))])
    for offset in range(0, size, CHUNK):
        buffer = next(buffers)[: size - offset]
        fill(file, buffer, offset)
        yield offset, buffer
