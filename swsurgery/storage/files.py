"""Open and read files, on this machine or elsewhere.

A file that changes or ends while it is read is an error. No link is followed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swsurgery.errors import ShardError
from swsurgery.storage.folder import Entry, Identity


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor. Never blocks on a FIFO, never follows a link.

    Raises ShardError for anything else.
    """
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


class Remote(Protocol):
    """A file on another machine, read in byte ranges. `sha256` is its digest if the server states one."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str | None: ...

    def pread(self, size: int, offset: int) -> bytes:
        """Read `size` bytes at `offset`; fewer only at the end of the file."""


Place = Path | Entry | Remote
"""A file is read by its path, by its entry in an open directory, or in ranges from another machine."""


@contextlib.contextmanager
def opened(path: Place) -> Iterator[int | Remote]:
    """Open a file for the duration of the block; yields a descriptor, or the remote file itself.

    Raises ShardError for anything but a regular file, and CheckpointError for an entry that was replaced since it was
    listed or is changed before the block ends.
    """
    if not isinstance(path, Path | Entry):
        yield path
        return
    fd = path.open() if isinstance(path, Entry) else open_regular(path)
    try:
        yield fd
        if isinstance(path, Entry):
            path.refuse_changed(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_local(path: Place) -> Iterator[int]:
    """Open a file of this machine as `opened` does. Raises TypeError for a remote file."""
    with opened(path) as file:
        if not isinstance(file, int):
            raise TypeError(f"{path} is not a file on this machine")
        yield file


def size_of(file: int | Remote) -> int:
    """Return the size of an opened file in bytes."""
    return os.fstat(file).st_size if isinstance(file, int) else file.size


def read_exactly(file: int | Remote, size: int, offset: int, path: Place) -> bytes:
    """Read exactly `size` bytes at `offset`. Raises ShardError, which names `path`, if the file ends early."""
    parts = []
    while size:
        part = os.pread(file, size, offset) if isinstance(file, int) else file.pread(size, offset)
        if not part:
            raise ShardError("the file ended while it was read", path, "it was changed or truncated meanwhile")
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)


def read_at_most(file: int | Remote, limit: int) -> bytes:
    """Read the whole file, or its first `limit` bytes, regardless of its reported size (0 for files in /proc)."""
    if not isinstance(file, int):
        return file.pread(limit, 0)
    parts = []
    while limit and (part := os.read(file, min(limit, 1 << 20))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


@dataclass(frozen=True)
class BaseFile:
    """One file of a checkpoint.

    `name` is relative to the checkpoint and uses forward slashes. `path` is what the file is read from: an entry of an
    open directory (`blobs/` for a cache snapshot) with the identity that it had when it was listed, or a remote file.
    `digest` is the sha256 that the Hub's cache or the Hub states, if any.
    """

    name: str
    path: Place
    size: int
    digest: str | None = None

    @property
    def identity(self) -> Identity | None:
        """Identity of the file when it was listed; None for a remote file."""
        return self.path.identity if isinstance(self.path, Entry) else None

    @property
    def mode(self) -> int:
        """Permissions of a copy: those of the file, and readable by the owner."""
        return self.path.mode & 0o777 | 0o400 if isinstance(self.path, Entry) else 0o666

    @property
    def is_here(self) -> bool:
        """True if the file is on this machine."""
        return isinstance(self.path, Path | Entry)


class Repository(Protocol):
    """A checkpoint on another machine, at one commit; its files are read in byte ranges."""

    @property
    def repo_id(self) -> str: ...

    @property
    def commit(self) -> str: ...

    @property
    def sub(self) -> str: ...

    @property
    def files(self) -> Mapping[str, Remote]: ...


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
