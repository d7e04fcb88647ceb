"""Copy a base into a staged directory, make the splices of a plan and hash both.

A splice replaces a few bytes of a file. Files are copied as bytes: no tensor is built and no header is rewritten. A
shard with splices is read once to compute its digests before and after the edit. A file that an interrupted run left in
the stage is kept if its bytes equal those to be written now; the base is read and hashed for that comparison.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from swsurgery.editing.copy_job import AppliedFile, Copied, CopyJob, Link
from swsurgery.editing.disk_space import refuse_without_room
from swsurgery.errors import CheckpointError, TargetError
from swsurgery.progress import Progress
from swsurgery.storage import filesystem
from swsurgery.storage.digest_cache import DigestCache
from swsurgery.storage.files import CHUNK, BaseFile, LocalFile, fill, read_exactly
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.hashing import check_digest, count_threads, refuse_other_header
from swsurgery.storage.pipeline import BUFFER_SIZE, Sink, compute_share, stream
from swsurgery.storage.shard import Shard
from swsurgery.storage.splice import Splice, group_by_file
from swsurgery.threads import Pool

if TYPE_CHECKING:  # these modules import numpy, which only changes of regions need
    from swsurgery.editing.undo_file import UndoWriter
    from swsurgery.rewriting.segments import RegionChange
    from swsurgery.rewriting.tally import Digests


def write_checkpoint(
    source: CopyJob,
    stage: Folder,
    *,
    link: Link,
    progress: Progress,
    digests: DigestCache | None = None,
    reuse: bool = False,
) -> Copied:
    """Write every file of `source` into the directory `stage`, and return the files with their digests.

    Each file of the base is hashed, and its digest is stored in `digests`. With `reuse`, a file without splices and
    without a pin is not hashed if `digests` contains its digest, which is then marked as unverified.

    Raises PlanError if a digest differs from its pin, CheckpointError if the base is unreadable or changed during the
    copy, and TargetError or NoSpace if the copy cannot be written.
    """
    if link == "hard" and source.in_cache:
        raise TargetError(
            "a hard link would share the file with other repositories and revisions in the Hugging Face cache",
            stage.path.parent,
            "use --link auto",
        )
    refuse_without_room(source.files, source.touched, stage, link)
    _make_folders(source.files, stage)
    progress.start(sum(f.size for f in source.files), "B", "copying")
    with contextlib.ExitStack() as opened:
        undo = _open_undo(source, stage, opened)
        copier = _Copier(source, stage, link, progress, digests or DigestCache(), reuse, undo)
        try:
            applied = copier.run()
        finally:
            progress.close()
        written = undo.write(stage, source.own_mode) if undo else None
    if digests is not None:
        digests.save()
    for file in source.elsewhere:
        assert file.digest is not None  # the caller chose files whose digests are known
        check_digest(file, file.digest, source.pins)
        applied.append(AppliedFile(file.name, file.size, file.digest, file.digest, "elsewhere"))
    files = tuple(sorted(applied, key=lambda f: f.name))
    found = sort_tallies(source.changes, copier.tallies)
    return Copied(files, *found, written)


def sort_tallies(
    changes: Mapping[str, Sequence[RegionChange]], tallies: Mapping[str, Digests]
) -> tuple[tuple[Digests, ...], tuple[Digests, ...]]:
    """Return the digests of the changed and of the protected regions, each in the order of the edits."""
    names = sorted((c.order, c.name, c.op) for group in changes.values() for c in group)
    changed = tuple(tallies[name] for _, name, op in names if op != "keep")
    return changed, tuple(tallies[name] for _, name, op in names if op == "keep")


def _open_undo(source: CopyJob, stage: Folder, opened: contextlib.ExitStack) -> UndoWriter | None:
    """Return the writer of the undo file; None if nothing is to be stored in it."""
    if source.undo_name is None or not source.changes:
        return None
    from swsurgery.editing.undo_file import UndoWriter

    changes = [change for group in source.changes.values() for change in group if change.op != "keep"]
    return opened.enter_context(UndoWriter(source.undo_name, changes, source.undo_limit, stage))


def _make_folders(files: Sequence[BaseFile], stage: Folder) -> None:
    """Make the folders of these files, each with at most the permissions of the base's folder."""
    modes: dict[str, int] = {}
    for file in files:
        parts = file.name.split("/")[:-1]
        entry = file.entry
        for name in ("/".join(parts[:end]) for end in range(1, len(parts) + 1)):
            if entry and entry.name == file.name:
                modes[name] = (entry.folder / name).stat().st_mode & 0o777 | 0o700
            else:  # in a cache, where all files are in the folder of the blobs
                modes[name] = 0o777
    for name in sorted(modes):
        with filesystem.convert_os_errors(stage / name):
            with contextlib.suppress(FileExistsError):
                filesystem.make_directory(stage / name, modes[name])
            with (stage / name).open_folder() as folder:
                filesystem.restrict(folder, modes[name])


@dataclass(frozen=True)
class _Written:
    """How one file was put into the stage.

    `digest` is the sha256 of the base's file, and `patched` is the sha256 of the file in the stage. `unverified` is
    True if both were copied from the cache of digests.
    """

    how: Literal["clone", "copy", "hard", "kept"]
    digest: str
    patched: str
    unverified: bool = False


class _Copier:
    """Copies files in several threads. They run in parallel, because reading, hashing and writing release the GIL."""

    def __init__(
        self,
        source: CopyJob,
        stage: Folder,
        link: Link,
        progress: Progress,
        digests: DigestCache,
        reuse: bool,
        undo: UndoWriter | None = None,
    ) -> None:
        self.source, self.stage, self.link = source, stage, link
        self.progress, self.digests, self.reuse = progress, digests, reuse
        self.threads = count_threads()
        large = sum(file.size > BUFFER_SIZE for file in source.files)
        self.share = compute_share(min(self.threads, large))
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.splices = group_by_file(source.splices)
        self.undo = undo
        self.tallies: dict[str, Digests] = {}

    def run(self) -> list[AppliedFile]:
        """Copy all files. Raises the first error of a thread, after all threads have stopped."""
        largest_first = sorted(self.source.files, key=lambda f: -f.size)
        with Pool(self.threads) as pool:
            futures: list[Future[AppliedFile]] = []
            try:
                futures += (pool.submit(self.copy, f) for f in largest_first)
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also on SIGINT: the threads check this event after every chunk
                self.stop.set()
                for future in futures:
                    future.cancel()
        faults = [fault for f in futures if not f.cancelled() and (fault := f.exception())]
        if faults:
            raise next((f for f in faults if not isinstance(f, _Stopped)), faults[0])
        return [f.result() for f in futures]

    def copy(self, file: BaseFile) -> AppliedFile:
        """Put one file into the stage, or keep the copy left by an interrupted run, and check the base's digest."""
        splices = self.splices.get(file.name, [])
        target = self.stage / file.name
        started = time.time()
        with file.require_local().open() as base:
            status = os.fstat(base.fd)
            written = self.keep(base, target, file, splices)
            if written is None:
                with filesystem.convert_os_errors(target):
                    filesystem.remove_file(target)
                known = self.look_up_digest(file, splices, status)
                if self.link == "hard" and not splices and file.name not in self.source.changes:
                    written = self.link_to(base, file, target, known)
                else:
                    written = self.write(base, target, file, splices, known)
            after = os.fstat(base.fd)
        if not written.unverified:
            check_digest(file, written.digest, self.source.pins)
            # Making the hard link changes the ctime. After any other change, other bytes may have been hashed.
            if written.how == "hard" or after.st_ctime_ns == status.st_ctime_ns:
                self.digests.put(after, written.digest, started)
        return AppliedFile(file.name, file.size, written.digest, written.patched, written.how, written.unverified)

    def link_to(self, base: LocalFile, file: BaseFile, target: Entry, known: str | None) -> _Written:
        """Make a hard link to the base's file. Raises CheckpointError if the file was replaced meanwhile."""
        with filesystem.convert_os_errors(target):
            filesystem.make_hard_link(base.where, target)
            linked = target.stat()
        if not os.path.samestat(linked, os.fstat(base.fd)):
            raise CheckpointError(
                "the file was replaced while it was being linked",
                file.source,
                "run again when no other program writes there",
            )
        if known:
            self.advance(file.size)
            return _Written("hard", known, known, unverified=True)
        digest, _ = stream(base, file, (), self.advance, header=self.header_of(file), share=self.share)
        return _Written("hard", digest, digest)

    def header_of(self, file: BaseFile) -> Shard | None:
        """Return the header from which the splices of a file were planned; None if the file is not a shard."""
        return self.source.shards.get(file.name)

    def look_up_digest(self, file: BaseFile, splices: list[Splice], status: os.stat_result) -> str | None:
        """Return the cached digest of a file, or None if the file must be hashed.

        A file must be hashed if it has a splice or a pin, if the Hub lists its digest, or if its digest is not cached.
        """
        if (
            not self.reuse
            or splices
            or file.digest is not None
            or file.name in {*self.source.pins, *self.source.changes}
        ):
            return None
        return self.digests.get(status)

    def keep(self, base: LocalFile, target: Entry, file: BaseFile, splices: list[Splice]) -> _Written | None:
        """Keep the file that an interrupted run left in the stage, if its bytes equal those to be written now.

        Returns None if no file was kept: there is none, its bytes differ, it has more than one hard link, it has a
        permission that the base's file lacks, or `link` is "hard".
        """
        if self.link == "hard" or not filesystem.is_there(target):
            return None
        read = 0

        def advance(size: int) -> None:
            nonlocal read
            read += size
            self.advance(size)

        with LocalFile(target).open() as kept:
            status = os.fstat(kept.fd)
            if status.st_size != file.size or status.st_nlink > 1 or status.st_mode & 0o777 & ~file.mode:
                return None
            with filesystem.convert_os_errors(target):
                filesystem.sync(kept.fd)
                filesystem.drop_cache(kept.fd)
            try:
                digest, patched = self.stream(base, file, splices, advance, _Comparison(kept))
            except _Different:
                self.advance(-read)
                return None
        return _Written("kept", digest, patched)

    def write(
        self, base: LocalFile, target: Entry, file: BaseFile, splices: list[Splice], known: str | None
    ) -> _Written:
        """Write one file and synchronise it with the disk. Remove the file after an error."""
        try:
            with filesystem.convert_os_errors(target):
                new = filesystem.create(target, file.mode)
                try:
                    done = self.fill(base, new, target, file, splices, known)
                    filesystem.sync(new)
                finally:
                    os.close(new)
        except BaseException:
            with contextlib.suppress(OSError):
                filesystem.remove_file(target)
            raise
        return done

    def fill(
        self, base: LocalFile, new: int, target: Entry, file: BaseFile, splices: list[Splice], known: str | None
    ) -> _Written:
        """Write the bytes of one file into the empty file with the descriptor `new`, by cloning it if possible."""
        cloned = self.link in ("auto", "clone") and filesystem.clone(base.fd, new)
        if self.link == "clone" and not cloned:
            raise TargetError("this file system cannot clone files", self.stage.path.parent, "use --link auto")
        header = self.header_of(file)
        if known:
            if cloned:
                self.advance(file.size)
            else:
                self.copy_in_kernel(base.fd, new, file)
            if header:
                begun = read_exactly(LocalFile(target), min(header.data_start, file.size), 0)
                refuse_other_header(hashlib.sha256(begun).hexdigest(), header, file)
            return _Written("clone" if cloned else "copy", known, known, unverified=True)
        if not cloned:
            filesystem.disable_cache(new)
            digest, patched = self.stream(
                base, file, splices, self.advance, functools.partial(filesystem.write_at, new)
            )
            return _Written("copy", digest, patched)
        with LocalFile(target).open() as copy:  # hash the clone, because the base may change from now on
            place = functools.partial(filesystem.write_at, new)
            digest, patched = self.stream(copy, file, splices, self.advance, place=place)
        for splice in splices:
            filesystem.write_at(new, splice.new, splice.offset)
        return _Written("clone", digest, patched)

    def stream(
        self,
        opened: LocalFile,
        file: BaseFile,
        splices: list[Splice],
        advance: Callable[[int], None],
        sink: Sink | None = None,
        place: Callable[[bytes, int], None] | None = None,
    ) -> tuple[str, str]:
        """Read a file once, with its splices and changed regions made; return the digests before and after them.

        `place` receives (bytes, offset) of each changed segment. The digests of regions are kept only if this succeeds.
        """
        header, changes = self.header_of(file), self.source.changes.get(file.name)
        if not changes:
            return stream(opened, file, splices, advance, sink, header, self.share)
        from swsurgery.rewriting.segments import list_segments
        from swsurgery.rewriting.stream import Receivers, stream_changed
        from swsurgery.rewriting.tally import Tally

        segments = list_segments(changes)
        with contextlib.ExitStack() as spooled:
            spool = spooled.enter_context(self.undo.open_spool()) if self.undo else None
            tally = Tally(changes, spool.add if spool else None)
            receivers = Receivers(sink, place, tally.observe)
            digests = stream_changed(opened, file, splices, segments, advance, receivers, header)
            if spool:
                spool.keep()
        with self.lock:
            self.tallies |= tally.finish()
        return digests

    def copy_in_kernel(self, base: int, new: int, file: BaseFile) -> None:
        """Copy a file whose bytes need not be hashed, without reading them into this process."""
        offset = 0
        while offset < file.size:
            copied = filesystem.copy_range(base, new, offset, min(64 * CHUNK, file.size - offset))
            if not copied:
                raise CheckpointError(
                    "the file was truncated while it was copied",
                    file.source,
                    "run again when no other program writes there",
                )
            offset += copied
            self.advance(copied)

    def advance(self, size: int) -> None:
        """Report progress in bytes. Raises _Stopped if another thread failed or the user interrupted."""
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.progress.advance(size)


class _Different(Exception):
    """Raised if a file that an interrupted run left in the stage differs from the file to be written."""


class _Comparison:
    """Compares each chunk from `stream` with the bytes of a file. Raises _Different if they differ."""

    def __init__(self, file: LocalFile) -> None:
        self.file = file
        self.buffer = bytearray()
        self.lock = threading.Lock()

    def __call__(self, chunk: memoryview, offset: int) -> None:
        with self.lock:
            if len(chunk) != len(self.buffer):
                self.buffer = bytearray(len(chunk))
            filled = fill(self.file, self.buffer, offset, may_end=True)
            # Comparing a bytearray is one call of memcmp; two memoryviews are compared byte by byte.
            if filled != len(chunk) or self.buffer != chunk:
                raise _Different


class _Stopped(Exception):
    """Raised in a thread to end it because another thread failed or the user interrupted."""
