"""Hold what belongs together."""

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
    """A read-only descriptor of a regular file; never blocks on a FIFO and never follows a link.

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
    """A file that is elsewhere and read by ranges. `sha256` is its digest if the server states one."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str | None: ...

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""


Place = Path | Entry | Remote
"""Where a file is to be read: on this machine, there in a directory that is held open, or elsewhere."""


@contextlib.contextmanager
def opened(path: Place) -> Iterator[int | Remote]:
    """A file to read from for the length of a block: a descriptor of a regular file, or what is read by ranges.

    Raises ShardError for anything else, and CheckpointError for a listed entry that is another file by now, or that
    was changed by the end of the block.
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
    """Bytes of an opened file."""
    return os.fstat(file).st_size if isinstance(file, int) else file.size


def read_exactly(file: int | Remote, size: int, offset: int, path: Place) -> bytes:
    """`size` bytes at `offset`, however many calls that takes. Raises ShardError at an early end."""
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
    """The whole file, or its first `limit` bytes, whatever size it says to have (some say 0)."""
    if not isinstance(file, int):
        return file.pread(limit, 0)
    parts = []
    while limit and (part := os.read(file, min(limit, 1 << 20))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


@dataclass(frozen=True)
class BaseFile:
    """One file of a checkpoint. `name` is relative with forward slashes; `digest` is the sha256 where the cache or the
    Hub vouches for it. `path` is where it is read: an entry of a held directory (`blobs/` for a cache snapshot) with
    the identity that it had when it was listed, or what reads it from afar."""

    name: str
    path: Place
    size: int
    digest: str | None = None

    @property
    def identity(self) -> Identity | None:
        """What the file was when it was listed; None for one that is elsewhere."""
        return self.path.identity if isinstance(self.path, Entry) else None

    @property
    def mode(self) -> int:
        """The permissions for a copy: no more than the file has, and so that its owner can read it."""
        return self.path.mode & 0o777 | 0o400 if isinstance(self.path, Entry) else 0o666

    @property
    def is_here(self) -> bool:
        """True for a file on this machine."""
        return isinstance(self.path, Path | Entry)


class Repository(Protocol):
    """A checkpoint that is elsewhere, at one commit; its files are read by ranges."""

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
"""First bytes of a file -> what it is instead, and the remedy."""


def not_the_file(start: bytes) -> tuple[str, str] | None:
    """Return what a file is instead of what it should be, and the remedy, by its first bytes; None if unknown."""
    return next(((what, remedy) for magic, what, remedy in NOT_THE_FILE if start.startswith(magic)), None)
