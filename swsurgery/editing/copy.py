"""Copy a base with a plan's splices into a staged directory, hashing on the way.

No tensor is built and no header re-written: files go over as bytes. A touched shard is read once, and its
digest before and after comes out of that one reading. A file that an interrupted run left in the stage is kept if
each of its bytes is what would be written now; the base is read and hashed for that comparison.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field
from typing import Literal

from swsurgery.editing.disk_space import refuse_without_room
from swsurgery.errors import CheckpointError, TargetError
from swsurgery.progress import Progress
from swsurgery.storage import filesystem
from swsurgery.storage.digest_cache import DigestCache
from swsurgery.storage.files import BaseFile, opened, read_exactly
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.hashing import CHUNK, _refuse_other_header, _threads, hold_to, stream
from swsurgery.storage.shard import Shard
from swsurgery.storage.splice import Splice, by_file
from swsurgery.threads import Pool

Link = Literal["auto", "clone", "copy", "hard"]


@dataclass(frozen=True)
class AppliedFile:
    """One file of the patched checkpoint. Digests are sha256 of the base's and of the patched bytes; None where an
    edit in place did not have to know them. `how` it got there: "kept" is what an interrupted run had copied, "place"
    what was edited where it lies, "elsewhere" what stays in the base's repository. `unverified` is True if the digests
    were not computed in this run but copied from the cache of digests or from an earlier record."""

    name: str
    size: int
    base_digest: str | None
    patched_digest: str | None
    how: Literal["clone", "copy", "hard", "kept", "place", "elsewhere"]
    unverified: bool = False


@dataclass(frozen=True)
class Applied:
    """What was written into the staged directory."""

    files: tuple[AppliedFile, ...]


@dataclass(frozen=True)
class Source:
    """What to copy: files of one checkpoint, the splices to make, and what the base's digests must be.

    `pins` maps a file name to (digest, who says so). `shards` are those that the splices were planned from: the header
    of what is copied must be the same. `elsewhere` are files that are not copied, and listed all the same; their
    digests are known.
    """

    files: tuple[BaseFile, ...]
    splices: tuple[Splice, ...]
    pins: dict[str, tuple[str, str]]
    in_cache: bool = False
    elsewhere: tuple[BaseFile, ...] = ()
    shards: Mapping[str, Shard] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.files]

    @property
    def own_mode(self) -> int:
        """The permissions of the files that are added: what all copied weights have. The records repeat weights."""
        return records_mode(self.files)

    @property
    def folder_mode(self) -> int:
        """The permissions of the new directory."""
        return folder_mode(self.files)


def folder_mode(files: Iterable[BaseFile]) -> int:
    """Return the permissions that all directories of these files have, for a new directory."""
    folders = {file.path.folder for file in files if isinstance(file.path, Entry)}
    return functools.reduce(operator.and_, (os.fstat(f.fd).st_mode for f in folders), 0o777) | 0o700


def outside_mode(files: Sequence[BaseFile]) -> int:
    """Return the permissions of a file that repeats weights and is written outside the directory of these files.

    Whoever cannot read the weights, or cannot enter their directory, may not read it.
    """
    may_enter = folder_mode(files) & 0o111
    return records_mode(files) & may_enter * 0o7 | 0o600


def records_mode(files: Iterable[BaseFile]) -> int:
    """The permissions that all weights among these files have; nobody else may read what repeats them."""
    modes = (file.mode for file in files if file.name.endswith(".safetensors"))
    return functools.reduce(operator.and_, modes, 0o666) | 0o600


def write_checkpoint(
    source: Source,
    stage: Folder,
    *,
    link: Link,
    progress: Progress,
    digests: DigestCache | None = None,
    reuse: bool = False,
) -> Applied:
    """Write every file of `source` into the directory `stage`.

    Each file of the base is hashed, and its digest is remembered in `digests`. With `reuse`, a file without splices and
    without a pin is not hashed if `digests` remembers it: its digests are then marked as unverified.

    Raises PlanError (not the base that was meant), CheckpointError (base unreadable or changed meanwhile),
    TargetError (cannot write).
    """
    if link == "hard" and source.in_cache:
        raise TargetError("a hard link into a Hugging Face cache shares the file with every repo and revision there",
                          stage.path.parent, "use --link auto")  # fmt: skip
    refuse_without_room(source.files, {s.file for s in source.splices}, stage, link)
    _make_folders(source.files, stage)
    progress.start(sum(f.size for f in source.files), "B", "copying")
    try:
        applied = _Copier(source, stage, link, progress, digests or DigestCache(), reuse).run()
    finally:
        progress.close()
    if digests is not None:
        digests.save()
    for file in source.elsewhere:
        hold_to(file, file.digest, source.pins)
        applied.append(AppliedFile(file.name, file.size, file.digest, file.digest, "elsewhere"))
    return Applied(tuple(sorted(applied, key=lambda f: f.name)))


def _make_folders(files: Sequence[BaseFile], stage: Folder) -> None:
    """Make the folders of these files, each no more accessible than the base's."""
    modes: dict[str, int] = {}
    for file in files:
        parts = file.name.split("/")[:-1]
        for name in ("/".join(parts[:end]) for end in range(1, len(parts) + 1)):
            here = isinstance(file.path, Entry) and file.path.name == file.name  # a cache has its blobs in one folder
            modes[name] = (file.path.folder / name).stat().st_mode & 0o777 | 0o700 if here else 0o777
    for name in sorted(modes):
        with filesystem.reported(stage / name):
            with contextlib.suppress(FileExistsError):
                filesystem.make_directory(stage / name, modes[name])
            with (stage / name).open_folder() as folder:
                filesystem.restrict(folder, modes[name])


@dataclass(frozen=True)
class _Written:
    """How one file got into the stage, and sha256 of the base's bytes and of those in the stage."""

    how: Literal["clone", "copy", "hard", "kept"]
    digest: str
    patched: str
    unverified: bool = False


class _Copier:
    """Copies files in a few threads; hashing, reading and writing all release the interpreter's lock."""

    def __init__(
        self, source: Source, stage: Folder, link: Link, progress: Progress, digests: DigestCache, reuse: bool
    ) -> None:
        self.source, self.stage, self.link = source, stage, link
        self.progress, self.digests, self.reuse = progress, digests, reuse
        self.threads = _threads()
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.splices = by_file(source.splices)

    def run(self) -> list[AppliedFile]:
        largest_first = sorted(self.source.files, key=lambda f: -f.size)
        with Pool(self.threads) as pool:
            futures = []
            try:
                futures += (pool.submit(self.copy, f) for f in largest_first)
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also on SIGINT: the threads look at this after every chunk
                self.stop.set()
                for future in futures:
                    future.cancel()
        faults = [f.exception() for f in futures if not f.cancelled() and f.exception()]
        if faults:
            raise next((f for f in faults if not isinstance(f, _Stopped)), faults[0])
        return [f.result() for f in futures]

    def copy(self, file: BaseFile) -> AppliedFile:
        splices = self.splices.get(file.name, [])
        target = self.stage / file.name
        started = time.time()
        with opened(file.path) as base:
            status = os.fstat(base)
            written = self.kept(base, target, file, splices)
            if written is None:
                with filesystem.reported(target):
                    filesystem.remove_file(target)
                known = self.remembered(file, splices, status)
                if self.link == "hard" and not splices:
                    self.link_to(base, file, target)
                    digest = known or stream(base, file, (), self.advance, header=self.header(file))[0]
                    self.advance(file.size if known else 0)
                    written = _Written("hard", digest, digest, bool(known))
                else:
                    written = self.write(base, target, file, splices, known)
            after = os.fstat(base)
        if not written.unverified:
            hold_to(file, written.digest, self.source.pins)
            # Our own hard link moves the ctime. If anything else did, the bytes may not be those that were hashed.
            if written.how == "hard" or after.st_ctime_ns == status.st_ctime_ns:
                self.digests.put(after, written.digest, started)
        return AppliedFile(file.name, file.size, written.digest, written.patched, written.how, written.unverified)

    def link_to(self, base: int, file: BaseFile, target: Entry) -> None:
        """Give the open file a second name. Raises CheckpointError if the link was made to another one."""
        with filesystem.reported(target):
            filesystem.hard_link(file.path, target)
            linked = target.stat()
        if not os.path.samestat(linked, os.fstat(base)):
            raise CheckpointError("was replaced while it was linked", file.path, "run again when it rests")

    def header(self, file: BaseFile) -> Shard | None:
        return self.source.shards.get(file.name)

    def remembered(self, file: BaseFile, splices: list[Splice], status: os.stat_result) -> str | None:
        """Return the digest from the cache if it may be copied: nothing is changed in the file, and nothing pins it."""
        if not self.reuse or splices or file.digest is not None or file.name in self.source.pins:
            return None
        return self.digests.get(status)

    def kept(self, base: int, target: Entry, file: BaseFile, splices: list[Splice]) -> _Written | None:
        """Keep what an interrupted run wrote if it is what would be written now, byte by byte; None if it is not."""
        if self.link == "hard" or not filesystem.is_there(target):
            return None
        read: list[int] = []
        with opened(target) as fd:
            status = os.fstat(fd)
            if status.st_size != file.size or status.st_nlink > 1 or status.st_mode & 0o777 & ~file.mode:
                return None
            with filesystem.reported(target):
                filesystem.sync(fd)
                filesystem.drop_cache(fd)
            try:
                digest, patched = stream(
                    base, file, splices, lambda n: (read.append(n), self.advance(n)), _Comparison(fd, target),
                    self.header(file),
                )  # fmt: skip
            except _Different:
                self.advance(-sum(read))
                return None
        return _Written("kept", digest, patched)

    def write(self, base: int, target: Entry, file: BaseFile, splices: list[Splice], known: str | None) -> _Written:
        """Write one file, durably."""
        try:
            with filesystem.reported(target):
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
        self, base: int, new: int, target: Entry, file: BaseFile, splices: list[Splice], known: str | None
    ) -> _Written:
        cloned = self.link in ("auto", "clone") and filesystem.clone(base, new)
        if self.link == "clone" and not cloned:
            raise TargetError("this file system cannot clone", self.stage.path.parent, "use --link auto")
        if known:
            if not cloned:
                self.copy_in_kernel(base, new, file)
            else:
                self.advance(file.size)
            if header := self.header(file):
                with opened(target) as copy:
                    begun = read_exactly(copy, min(header.data_start, file.size), 0, target)
                _refuse_other_header(hashlib.sha256(begun).hexdigest(), header, file)
            return _Written("clone" if cloned else "copy", known, known, unverified=True)
        if not cloned:
            filesystem.bypass_cache(new)
            write, header = functools.partial(filesystem.write_all, new), self.header(file)
            digest, patched = stream(base, file, splices, self.advance, write, header)
            return _Written("copy", digest, patched)
        with opened(target) as copy:  # the base may change from now on, and the clone does not change with it
            digest, patched = stream(copy, file, splices, self.advance, header=self.header(file))
        for splice in splices:
            filesystem.write_at(new, splice.new, splice.offset)
        return _Written("clone", digest, patched)

    def copy_in_kernel(self, base: int, new: int, file: BaseFile) -> None:
        offset = 0
        while offset < file.size:
            copied = filesystem.copy_range(base, new, offset, min(64 * CHUNK, file.size - offset))
            if not copied:
                raise CheckpointError("the file ended while it was read", file.path, "it was truncated meanwhile")
            offset += copied
            self.advance(copied)

    def advance(self, size: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.progress.advance(size)


class _Different(Exception):
    """A file in the stage is not what would be written now."""


class _Comparison:
    """Compare a file with what is given chunk by chunk. Raises _Different at the first chunk that differs."""

    def __init__(self, fd: int, path: Entry) -> None:
        self.fd, self.path, self.offset = fd, path, 0
        self.buffer = bytearray(CHUNK)

    def __call__(self, chunk: memoryview) -> None:
        if len(chunk) != len(self.buffer):
            self.buffer = bytearray(len(chunk))
        view, filled = memoryview(self.buffer), 0
        with filesystem.reported(self.path):
            while count := os.preadv(self.fd, [view[filled:]], self.offset + filled):
                filled += count
        # A bytearray is compared in one go, two memoryviews are compared byte by byte.
        if filled != len(chunk) or self.buffer != chunk:
            raise _Different
        self.offset += filled


class _Stopped(Exception):
    """Another thread failed, or the user interrupted: leave quietly."""
