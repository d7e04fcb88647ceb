"""Open and read files, on this machine or on the Hub.

A file that changes or ends while it is read is an error. No link is followed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from swsurgery.errors import ShardError, SwsurgeryError
from swsurgery.storage.folder import Entry

CHUNK = 4 << 20
"""Bytes read at a time: large enough to keep the disk and the hash busy, small enough for the processor cache."""

SMALLEST = 64 << 10
"""Minimum number of bytes requested at a time if the reported size of a file may be wrong."""


class File(Protocol):
    """A file to read: a `LocalFile` of this machine or a `RemoteFile` on the Hub. Messages name it by its string."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def open(self) -> AbstractContextManager[File]:
        """Keep the file open during the block, and yield it. Outside such a block each read opens the file again."""

    def readinto(self, buffer: memoryview, offset: int) -> int:
        """Read bytes from `offset` on into `buffer`, and return their number; 0 only at the end of the file.

        Raises SwsurgeryError.
        """


@dataclass(frozen=True)
class LocalFile:
    """A regular file of this machine, found by its path or by its entry in an open directory.

    It is opened without following a link and without blocking on a FIFO. An entry has the identity that the file had
    when it was listed. `fd` is the descriptor of an open file, otherwise -1.
    """

    where: Path | Entry
    fd: int = -1

    def __str__(self) -> str:
        return str(self.where)

    @property
    def size(self) -> int:
        """Size in bytes. Raises the errors of `open`."""
        with self.open() as file:
            return os.fstat(file.fd).st_size

    @contextlib.contextmanager
    def open(self) -> Iterator[LocalFile]:
        """Keep the file open during the block, and yield it.

        Raises ShardError for anything but a regular file, and CheckpointError for an entry that was replaced since it
        was listed or is changed before the block ends.
        """
        if self.fd >= 0:
            yield self
            return
        fd = self.where.open() if isinstance(self.where, Entry) else _open_path(self.where)
        try:
            yield replace(self, fd=fd)
            if isinstance(self.where, Entry):
                self.where.refuse_changed(fd)
        finally:
            os.close(fd)

    def readinto(self, buffer: memoryview, offset: int) -> int:
        """Read bytes from `offset` on into `buffer`, and return their number; 0 only at the end of the file.

        Raises SwsurgeryError if the disk fails: that is no fault of the checkpoint.
        """
        with self.open() as file:
            try:
                return os.preadv(file.fd, [buffer], offset)
            except OSError as error:
                raise SwsurgeryError(f"cannot read ({os.strerror(error.errno or 0)})", self) from error


def _open_path(path: Path) -> int:
    """Open a regular file for reading and return its descriptor. Raises ShardError for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else os.strerror(error.errno or 0)
        remedy = "give the directory that holds the real files" if path.is_symlink() else ""
        raise ShardError(reason, path, remedy) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ShardError("is not a regular file", path)
    return fd


def fill(file: File, buffer: bytearray | memoryview, offset: int, *, may_end: bool = False) -> int:
    """Read from `offset` on until the buffer is full, and return the number of bytes read.

    Raises ShardError if the file ends before, unless `may_end` is set.
    """
    view, filled = memoryview(buffer), 0
    while filled < len(view):
        count = file.readinto(view[filled:], offset + filled)
        if not count:
            if may_end:
                break
            raise ShardError("the file ended while it was read", file, "it was changed or truncated meanwhile")
        filled += count
    return filled


def read_exactly(file: File, size: int, offset: int) -> bytes:
    """Read exactly `size` bytes at `offset`. Raises ShardError if the file ends early, SwsurgeryError."""
    buffer = bytearray(size)
    fill(file, buffer, offset)
    return bytes(buffer)


def read_at_most(file: File, limit: int) -> bytes:
    """Read the whole file, or its first `limit` bytes, regardless of its reported size (0 for files in /proc)."""
    parts, offset = [], 0
    with file.open() as opened:
        while offset < limit:
            part = bytearray(min(limit - offset, max(opened.size - offset, SMALLEST)))
            count = fill(opened, part, offset, may_end=True)
            parts.append(part[:count])
            offset += count
            if count < len(part):
                break
    return b"".join(parts)


def has_same_bytes(one: File, other: File, size: int, offset: int = 0, other_offset: int = 0) -> bool:
    """Compare `size` bytes of two files, from an offset on in each. Raises ShardError if a file ends early."""
    ours, theirs = bytearray(min(size, CHUNK)), bytearray(min(size, CHUNK))
    with one.open() as first, other.open() as second:
        for at in range(0, size, CHUNK):
            if size - at < len(ours):
                ours, theirs = bytearray(size - at), bytearray(size - at)
            fill(first, ours, offset + at)
            fill(second, theirs, other_offset + at)
            if ours != theirs:
                return False
    return True


@dataclass(frozen=True)
class BaseFile:
    """One file of a checkpoint.

    `name` is relative to the checkpoint and uses forward slashes. `source` is what the file is read from: an entry of
    an open directory (`blobs/` for a cache snapshot), or a remote file. `size` is in bytes, as listed. `digest` is the
    sha256 that the Hub's cache or the Hub states, if any.
    """

    name: str
    source: File
    size: int
    digest: str | None = None

    @property
    def entry(self) -> Entry | None:
        """The entry in an open directory, with the file's identity when it was listed; None for a remote file."""
        where = self.source.where if isinstance(self.source, LocalFile) else None
        return where if isinstance(where, Entry) else None

    @property
    def mode(self) -> int:
        """Permissions of a copy: those of the file, and readable by the owner."""
        return self.entry.mode & 0o777 | 0o400 if self.entry else 0o666

    @property
    def is_here(self) -> bool:
        """True if the file is on this machine."""
        return isinstance(self.source, LocalFile)

    def require_local(self) -> LocalFile:
        """Return the file, which must be on this machine. Raises TypeError for a remote file."""
        if not isinstance(self.source, LocalFile):
            raise TypeError(f"{self.source} is not a file on this machine")
        return self.source


NOT_THE_FILE = (
    (b"version ", "is a git-lfs pointer, not the file itself", "run git lfs pull"),
    (b"\x1f\x8b", "is a gzip file", "decompress it"),
    (b"PK\x03\x04", "is a zip file, perhaps a pickled checkpoint", "convert it to safetensors"),
    (b"GGUF", "is a GGUF file", "convert it to safetensors"),
    (b"<!", "is an HTML page, perhaps a failed download", "download it again"),
    (b"<htm", "is an HTML page, perhaps a failed download", "download it again"),
)
"""Each row contains the first bytes of a file, what such a file is, and the remedy."""


def recognise_format(start: bytes) -> tuple[str, str] | None:
    """Recognise a file of another format by its first bytes. Returns (reason, remedy), or None if not recognised."""
    return next(((what, remedy) for magic, what, remedy in NOT_THE_FILE if start.startswith(magic)), None)
