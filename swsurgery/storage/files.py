"""Open and read files, on this machine or on the Hub.

It is an error if a file changes or ends while it is read. Symbolic links are not followed.
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
"""Minimum number of bytes that `read_at_most` reads at a time, because the reported size of a file may be wrong."""


class File(Protocol):
    """A file to read: a `LocalFile` of this machine or a `RemoteFile` on the Hub. Messages contain its `str()`."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def open(self) -> AbstractContextManager[File]:
        """Keep the file open during the block, and yield it. Each read outside of the block opens the file again."""

    def readinto(self, buffer: memoryview, offset: int) -> int:
        """Read bytes into `buffer`, starting at `offset` in the file, and return the number of bytes read.

        The number may be less than the size of the buffer; it is 0 only at the end of the file. Raises SwsurgeryError.
        """


@dataclass(frozen=True)
class LocalFile:
    """A regular file of this machine, given by its path or by its Entry in a directory that is kept open.

    The file is opened without following a symbolic link and without blocking on a FIFO. `fd` is the descriptor of the
    file while it is open, otherwise -1.
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

        Raises ShardError for anything but a regular file. If `where` is an Entry, raises CheckpointError if the file
        was changed or replaced after its directory was listed, or is changed before the block ends.
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
        """Read bytes into `buffer`, starting at `offset` in the file, and return the number of bytes read.

        The number may be less than the size of the buffer; it is 0 only at the end of the file. Raises the errors of
        `open`, and SwsurgeryError if the disk fails.
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
    """Read bytes, starting at `offset` in the file, until `buffer` is full, and return the number of bytes read.

    If the file ends before the buffer is full, raises ShardError, or with `may_end` returns the smaller number.
    """
    view, filled = memoryview(buffer), 0
    while filled < len(view):
        count = file.readinto(view[filled:], offset + filled)
        if not count:
            if may_end:
                break
            raise ShardError("the file ended while it was read", file, "run again when no other program writes to it")
        filled += count
    return filled


def read_exactly(file: File, size: int, offset: int) -> bytes:
    """Read exactly `size` bytes at `offset`. Raises ShardError if the file is too short; errors of `readinto`."""
    buffer = bytearray(size)
    fill(file, buffer, offset)
    return bytes(buffer)


def read_at_most(file: File, limit: int) -> bytes:
    """Read the whole file, but at most `limit` bytes. The reported size is not trusted: in /proc it is 0."""
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
    """Compare `size` bytes of `one` at `offset` with the bytes of `other` at `other_offset`. Returns True if equal.

    Raises ShardError if a file is too short.
    """
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

    `name` is the path of the file relative to the checkpoint, with forward slashes. The bytes are read from `source`: a
    LocalFile of an Entry (in `blobs/` for a snapshot in the Hub's cache), or a RemoteFile. `size` is the size in bytes
    when the directory was listed. `digest` is the sha256 that the Hub or the Hub's cache states, or None.
    """

    name: str
    source: File
    size: int
    digest: str | None = None

    @property
    def entry(self) -> Entry | None:
        """The Entry from which a local file is read; None for a remote file."""
        where = self.source.where if isinstance(self.source, LocalFile) else None
        return where if isinstance(where, Entry) else None

    @property
    def mode(self) -> int:
        """Permissions of a copy: those of the file plus read permission for the owner, or 0o666 for a remote file."""
        return self.entry.mode & 0o777 | 0o400 if self.entry else 0o666

    @property
    def is_here(self) -> bool:
        """True if the file is on this machine."""
        return isinstance(self.source, LocalFile)

    def require_local(self) -> LocalFile:
        """Return `source` as a LocalFile. Raises TypeError for a remote file."""
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
"""Files of other formats that users give by mistake. Each row contains the first bytes of a file, the fault that a
message reports, and its remedy."""


def recognise_format(start: bytes) -> tuple[str, str] | None:
    """Recognise a format of NOT_THE_FILE by the first bytes of a file.

    Returns (fault, remedy) for a message, or None for any other file.
    """
    return next(((what, remedy) for magic, what, remedy in NOT_THE_FILE if start.startswith(magic)), None)
