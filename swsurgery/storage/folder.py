"""A directory held open, and its files opened relative to it.

A path that was checked can mean another file a moment later. A descriptor cannot: what is opened below a held directory
is in that directory, whatever its path means by then, and no component of a name is followed through a link. An
`Identity` tells whether a file is still the one that was listed. Reads only; what changes a file is in filesystem.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swsurgery.errors import CheckpointError, ShardError

OPENAT2 = 437
"""Number of the system call on every architecture of Linux; glibc 2.36 has no function for it."""

_BENEATH = 0x02 | 0x04 | 0x08
"""RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_REGULAR = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Field = Literal["dev", "ino", "size", "mtime_ns", "ctime_ns"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a file from every other file, and from itself after a change. Times are in nanoseconds."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Take the identity from the result of a stat."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def same(self, other: Identity, *ignored: Field) -> bool:
        """Compare all fields but the `ignored`: "ctime_ns" after our own hard link, both times after our writes."""
        fields: tuple[Field, ...] = ("dev", "ino", "size", "mtime_ns", "ctime_ns")
        return all(getattr(self, field) == getattr(other, field) for field in fields if field not in ignored)


class Folder:
    """A directory held open by the descriptor `fd`; `path` is where it was opened and serves messages.

    The descriptor is closed with the object, by `close`, or at the end of a `with` block. `folder / name` is the entry
    of that name, which may be a path of several components.
    """

    def __init__(self, fd: int, path: Path):
        self.fd, self.path = fd, path
        self.linked: set[tuple[int, int]] = set()
        self._close = weakref.finalize(self, os.close, fd)

    @classmethod
    def at(cls, path: Path) -> Folder:
        """Open a directory that is no link itself. Raises OSError."""
        return cls(os.open(path, _DIRECTORY), path)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        self._close()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def __truediv__(self, name: str) -> Entry:
        return Entry(self, name)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Folder({self.fd}, {str(self.path)!r})"

    def scan(self, name: str = "") -> list[Entry]:
        """List the directory, or the one `name` below it, sorted; each entry has its identity. Raises OSError."""
        fd = open_beneath(self.fd, name or ".", _DIRECTORY)  # of its own, for the place in the listing is shared
        try:
            with os.scandir(fd) as found:
                names = sorted(entry.name for entry in found)
            return [self._entry(fd, f"{name}/{n}" if name else n, n) for n in names]
        finally:
            os.close(fd)

    def _entry(self, fd: int, name: str, last: str) -> Entry:
        status = os.stat(last, dir_fd=fd, follow_symlinks=False)
        return Entry.listed(self, name, status)


@dataclass(frozen=True)
class Entry:
    """A name below a held directory. The rest is what it was when it was listed, if it was: its identity, its mode and
    its number of hard links."""

    folder: Folder
    name: str
    identity: Identity | None = None
    mode: int = 0
    links: int = 0

    @classmethod
    def listed(cls, folder: Folder, name: str, status: os.stat_result) -> Entry:
        """Take identity, mode and links from a status of the entry."""
        return cls(folder, name, Identity.of(status), status.st_mode, status.st_nlink)

    @property
    def path(self) -> Path:
        """Where it is, for messages; to open it by this path would be to trust the path."""
        return self.folder.path / self.name

    def __str__(self) -> str:
        return str(self.path)

    def with_name(self, name: str) -> Entry:
        """The entry of another name beside this one."""
        return Entry(self.folder, "/".join((*self.name.split("/")[:-1], name)))

    @contextlib.contextmanager
    def placed(self) -> Iterator[tuple[int, str]]:
        """Hold the directory that has the entry: (its descriptor, the last component). Raises OSError."""
        inner, _, last = self.name.rpartition("/")
        if not inner:
            _refuse_climbing(last)
            yield self.folder.fd, last
            return
        fd = open_beneath(self.folder.fd, inner, _DIRECTORY)
        try:
            _refuse_climbing(last)
            yield fd, last
        finally:
            os.close(fd)

    def stat(self) -> os.stat_result:
        """The status of the entry itself, also of a link. Raises OSError."""
        with self.placed() as (fd, last):
            return os.stat(last, dir_fd=fd, follow_symlinks=False)

    def readlink(self) -> str:
        """What the entry, a link, points to. Raises OSError."""
        with self.placed() as (fd, last):
            return os.readlink(last, dir_fd=fd)

    def open_folder(self) -> Folder:
        """Hold the directory that the entry is. Raises OSError."""
        return Folder(open_beneath(self.folder.fd, self.name, _DIRECTORY), self.path)

    def open(self) -> int:
        """Open a regular file for reading; never blocks on a FIFO. Raises ShardError, or CheckpointError for a file
        that is not the one that was listed."""
        try:
            fd = open_beneath(self.folder.fd, self.name, os.O_RDONLY | _REGULAR)
        except OSError as error:
            if error.errno == errno.ELOOP or self._is_link():
                raise ShardError("is a symbolic link", self, "give the directory that holds the real files") from None
            raise ShardError(os.strerror(error.errno or 0), self) from None
        return self.sound(fd)

    def expect_new_ctime(self) -> None:
        """Ignore the ctime of this file from now on, for this run gives it another name."""
        if self.identity is not None:
            self.folder.linked.add((self.identity.dev, self.identity.ino))

    def refuse_changed(self, fd: int, *ignored: Field) -> None:
        """Raise CheckpointError if the open file is not, or no longer, what was listed; without a listing do
        nothing."""
        self._refuse(os.fstat(fd), ignored)

    def refuse_replaced(self) -> None:
        """Raise CheckpointError if the name now has another file than the one listed, or a changed one."""
        try:
            status = self.stat()
        except OSError as error:
            raise CheckpointError(os.strerror(error.errno or 0), self) from None
        self._refuse(status, ())

    def _refuse(self, status: os.stat_result, ignored: tuple[Field, ...]) -> None:
        if self.identity is None:
            return
        # A hard link that is made or removed moves the ctime: by this run, or by another one from the same base.
        if (self.identity.dev, self.identity.ino) in self.folder.linked or self.links != status.st_nlink:
            ignored += ("ctime_ns",)
        if not self.identity.same(Identity.of(status), *ignored):
            raise CheckpointError("was changed or replaced while it was read", self, "run again when it rests")

    def sound(self, fd: int) -> int:
        """Return the descriptor if it is of a regular file, and of the one listed; close it if not. Raises what `open`
        does."""
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ShardError("is not a regular file", self)
            self.refuse_changed(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _is_link(self) -> bool:
        try:
            return stat.S_ISLNK(self.stat().st_mode)
        except OSError:
            return False


def open_beneath(folder: int, name: str, flags: int) -> int:
    """Open a path below the directory of a descriptor, through no link and never out of it. Raises OSError."""
    _refuse_climbing(name)
    fd = _openat2(folder, name, flags)
    return _by_components(folder, name, flags) if fd is None else fd


def _refuse_climbing(name: str) -> None:
    parts = name.split("/")
    if name != "." and any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)


@functools.cache
def _syscall() -> Callable[..., int]:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call


class _How(ctypes.Structure):
    """struct open_how of linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _openat2(folder: int, name: str, flags: int) -> int | None:
    """The system call; None if this kernel does not have it or will not do it."""
    if not hasattr(os, "O_PATH"):  # not Linux, where the number would mean another call
        return None
    how = _How(flags, 0, _BENEATH)
    fd = _syscall()(
        ctypes.c_long(OPENAT2),
        ctypes.c_long(folder),
        ctypes.c_char_p(os.fsencode(name)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EPERM, errno.EAGAIN):  # an old kernel, a sandbox, a rename at the same moment
        return None
    raise OSError(code, os.strerror(code), name)


def _by_components(folder: int, name: str, flags: int) -> int:
    """Open one component after the other, each relative to the one before."""
    *folders, last = name.split("/")
    here = folder
    try:
        for part in folders:
            inner = os.open(part, _DIRECTORY, dir_fd=here)
            if here != folder:
                os.close(here)
            here = inner
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=here)
    finally:
        if here != folder:
            os.close(here)
