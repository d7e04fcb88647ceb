"""Keep a directory open and open its files relative to it.

A checked path can refer to another file a moment later. A descriptor cannot: a file opened relative to an open
directory is in that directory, even if the path of the directory now refers to another one. If any component of a name
is a symbolic link, the file is not opened. An `Identity` shows whether a name still refers to the file that was listed,
with the same contents. This module only reads; filesystem.py contains the functions that change files.
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
"""Number of the system call openat2 on every Linux architecture. glibc 2.36 has no function for this call."""

_BENEATH = 0x02 | 0x04 | 0x08
"""Flags for openat2: RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_REGULAR = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Field = Literal["dev", "ino", "size", "mtime_ns", "ctime_ns"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Five numbers of a stat result, by which a file that was changed or replaced is recognised.

    Times are in nanoseconds.
    """

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Make the identity of the file whose stat result is `status`."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_same(self, other: Identity, *ignored: Field) -> bool:
        """Return True if all fields except `ignored` are equal.

        A caller ignores "ctime_ns" if this run made a hard link to the file, and both times if this run wrote to it.
        """
        fields: tuple[Field, ...] = ("dev", "ino", "size", "mtime_ns", "ctime_ns")
        return all(getattr(self, field) == getattr(other, field) for field in fields if field not in ignored)


class Folder:
    """A directory that is kept open. `fd` is its descriptor; `path`, by which it was opened, is only for messages.

    `close`, the end of a `with` block and the deletion of the object close the descriptor. `folder / name` is the Entry
    `name` below the directory; `name` may have several components, such as "unet/config.json". `linked` contains the
    device and inode of each file whose ctime is ignored, because this run makes a hard link to the file.
    """

    def __init__(self, fd: int, path: Path):
        self.fd, self.path = fd, path
        self.linked: set[tuple[int, int]] = set()
        self._close = weakref.finalize(self, os.close, fd)

    @classmethod
    def at(cls, path: Path) -> Folder:
        """Open a directory; its last component must not be a link. Raises OSError."""
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
        """List the entries of the directory, or of its subdirectory `name`, sorted by name. Raises OSError.

        Each entry has the identity, mode and links of its file.
        """
        fd = open_beneath(self.fd, name or ".", _DIRECTORY)  # a new descriptor, because the read position is shared
        try:
            with os.scandir(fd) as found:
                names = sorted(entry.name for entry in found)
            return [self._entry(fd, f"{name}/{n}" if name else n, n) for n in names]
        finally:
            os.close(fd)

    def has_visible(self, name: str) -> bool:
        """Return True if a file of this name would be part of the directory's contents, whether it exists or not."""
        return True

    def _entry(self, fd: int, name: str, last: str) -> Entry:
        status = os.stat(last, dir_fd=fd, follow_symlinks=False)
        return Entry.from_status(self, name, status)


class SingleFile(Folder):
    """An open directory of which only the file `name` is visible; all other files are treated as if they were absent.

    Its `str()` is the path of the file.
    """

    def __init__(self, fd: int, path: Path, name: str):
        super().__init__(fd, path)
        self.name = name

    @classmethod
    def find(cls, path: Path) -> SingleFile:
        """Open the directory of the file `path`. Raises OSError."""
        folder = Path(os.path.realpath(path.parent))
        return cls(os.open(folder, _DIRECTORY), folder, path.name)

    def __str__(self) -> str:
        return str(self.path / self.name)

    def scan(self, name: str = "") -> list[Entry]:
        """List the file alone. Raises OSError."""
        return [] if name else [self._entry(self.fd, self.name, self.name)]

    def has_visible(self, name: str) -> bool:
        """Return True for the name of the file."""
        return name == self.name


@dataclass(frozen=True)
class Entry:
    """A name below an open directory, such as "unet/config.json". A file of this name need not exist.

    `identity`, `mode` and `links` (the number of hard links) describe the file at the time when the directory was
    listed. `identity` is None if the entry does not come from a listing.
    """

    folder: Folder
    name: str
    identity: Identity | None = None
    mode: int = 0
    links: int = 0

    @classmethod
    def from_status(cls, folder: Folder, name: str, status: os.stat_result) -> Entry:
        """Make an entry with the identity, mode and links of a stat result."""
        return cls(folder, name, Identity.of(status), status.st_mode, status.st_nlink)

    @property
    def path(self) -> Path:
        """Path for messages. Never open the file by this path, which may refer to another file by now."""
        return self.folder.path / self.name

    def __str__(self) -> str:
        return str(self.path)

    def with_name(self, name: str) -> Entry:
        """Make an entry of another name in the same directory."""
        return Entry(self.folder, "/".join((*self.name.split("/")[:-1], name)))

    @contextlib.contextmanager
    def open_parent(self) -> Iterator[tuple[int, str]]:
        """Open the directory that contains the entry. Yields its descriptor and the last component of `name`.

        Raises OSError.
        """
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
        """Stat the entry without following a link. Raises OSError."""
        with self.open_parent() as (fd, last):
            return os.stat(last, dir_fd=fd, follow_symlinks=False)

    def readlink(self) -> str:
        """Read the target of the entry, which must be a link. Raises OSError."""
        with self.open_parent() as (fd, last):
            return os.readlink(last, dir_fd=fd)

    def open_folder(self) -> Folder:
        """Open the entry as a directory. Raises OSError."""
        return Folder(open_beneath(self.folder.fd, self.name, _DIRECTORY), self.path)

    def open(self) -> int:
        """Open a regular file for reading, without blocking on a FIFO, and return its descriptor.

        Raises ShardError if the file cannot be opened or is not regular, and CheckpointError if it was changed or
        replaced after the listing.
        """
        try:
            fd = open_beneath(self.folder.fd, self.name, os.O_RDONLY | _REGULAR)
        except OSError as error:
            if error.errno == errno.ELOOP or self._is_link():
                raise ShardError("is a symbolic link", self, "give the directory that holds the real files") from None
            raise ShardError(os.strerror(error.errno or 0), self) from None
        return self.check_descriptor(fd)

    def expect_new_ctime(self) -> None:
        """Ignore the ctime of this file from now on, because this run is about to create a hard link to it."""
        if self.identity is not None:
            self.folder.linked.add((self.identity.dev, self.identity.ino))

    def refuse_changed(self, fd: int, *ignored: Field) -> None:
        """Raise CheckpointError if the open file `fd` is not the listed file, or was changed after the listing.

        `ignored` names the fields of the identity that may differ. If the entry has no identity, nothing is compared.
        """
        self._refuse(os.fstat(fd), ignored)

    def refuse_replaced(self) -> None:
        """Raise CheckpointError if the name no longer refers to the file that was listed, or the file was changed."""
        try:
            status = self.stat()
        except OSError as error:
            raise CheckpointError(os.strerror(error.errno or 0), self) from None
        self._refuse(status, ())

    def _refuse(self, status: os.stat_result, ignored: tuple[Field, ...]) -> None:
        if self.identity is None:
            return
        # Creating or removing a hard link changes the ctime. This run may do that, or another run on the same base.
        if (self.identity.dev, self.identity.ino) in self.folder.linked or self.links != status.st_nlink:
            ignored += ("ctime_ns",)
        if not self.identity.is_same(Identity.of(status), *ignored):
            raise CheckpointError(
                "was changed or replaced while it was read", self, "run again when no other program writes there"
            )

    def check_descriptor(self, fd: int) -> int:
        """Return `fd` if it refers to the regular file that was listed. Otherwise close `fd` and raise an error.

        Raises ShardError if the file is not regular, and the errors of `refuse_changed`.
        """
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
    """Open the path `name` relative to the directory descriptor `folder`, and return the new descriptor.

    Follows no link and never leaves the directory. Raises OSError.
    """
    _refuse_climbing(name)
    fd = _call_openat2(folder, name, flags)
    return _open_by_components(folder, name, flags) if fd is None else fd


def _refuse_climbing(name: str) -> None:
    parts = name.split("/")
    if name != "." and any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)


@functools.cache
def _load_syscall() -> Callable[..., int]:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call


class _How(ctypes.Structure):
    """The struct open_how of linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _call_openat2(folder: int, name: str, flags: int) -> int | None:
    """Call openat2. Returns None if the kernel does not provide it or refuses to run it. Raises OSError."""
    if not hasattr(os, "O_PATH"):  # not Linux, where OPENAT2 may be the number of another call
        return None
    how = _How(flags, 0, _BENEATH)
    fd = _load_syscall()(
        ctypes.c_long(OPENAT2),
        ctypes.c_long(folder),
        ctypes.c_char_p(os.fsencode(name)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EPERM, errno.EAGAIN):  # an old kernel, a sandbox, a concurrent rename
        return None
    raise OSError(code, os.strerror(code), name)


def _open_by_components(folder: int, name: str, flags: int) -> int:
    """Open the path `name` one component at a time, each relative to the one before. Raises OSError."""
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
