"""Make every system call of swsurgery that changes a file system.

Most functions make one system call, and repeat it if the kernel may do less than requested. A failed fsync is never
retried, because a second fsync may succeed although the data is lost. If an Entry is passed instead of a path, the call
is relative to the descriptor of its folder. `convert_os_errors` turns an OSError into a TargetError with the path and a
remedy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from swsurgery.errors import TargetError
from swsurgery.storage.folder import Entry, Folder

FICLONE = 0x40049409
"""Linux ioctl that makes a file share all blocks of another file (btrfs, xfs)."""

RENAME_NOREPLACE = 1
"""Flag of renameat2: fail if the new name exists."""

AT_FDCWD = -100
"""Descriptor that stands for the current directory in system calls."""

_CANNOT_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
_CANNOT_COPY_RANGE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS}
_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another file system",
    errno.EDQUOT: "free some of the quota, or write to another file system",
    errno.EACCES: "choose a place where you may write",
    errno.EPERM: "choose a place where you may write",
    errno.EROFS: "write to a file system that is not read-only",
    errno.ENOENT: "create the directory first",
    errno.EMFILE: "raise the limit of open files",
    errno.EXDEV: "use --link copy: hard links and clones cannot cross file systems",
}


@contextlib.contextmanager
def _open_parent(path: Path | Entry) -> Iterator[tuple[str, int | None]]:
    """Yield the two arguments with which a system call finds a file: its name and the descriptor of its directory.

    For a path, the name is the whole path and the descriptor is None. Raises OSError.
    """
    if isinstance(path, Entry):
        with path.open_parent() as (fd, name):
            yield name, fd
    else:
        yield os.fspath(path), None


@contextlib.contextmanager
def convert_os_errors(path: Path | Entry | Folder | str) -> Iterator[None]:
    """Convert an OSError of the block to a TargetError about `path`."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise TargetError(f"cannot write ({os.strerror(error.errno or 0)})", path, remedy) from error


def is_there(path: Path | Entry) -> bool:
    """Return True if a file, a directory or a link of this name exists, even if the link is broken.

    Raises TargetError if the system call fails. os.path.lexists would then return False, and a caller would conclude
    that no journal exists.
    """
    try:
        with _open_parent(path) as (name, fd):
            os.lstat(name, dir_fd=fd)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise TargetError(f"cannot determine whether it exists ({os.strerror(error.errno or 0)})", path) from error
    return True


@contextlib.contextmanager
def lock_directory(folder: Path | Folder, exclusive: bool, *, wait: bool = False) -> Iterator[None]:
    """Lock a directory during the block: exclusively for editing in place, or shared for reading.

    The kernel releases the lock if the process is killed. If another run has a conflicting lock, waits for that run if
    `wait` is True, and raises TargetError otherwise.
    """
    with convert_os_errors(folder):
        where = "." if isinstance(folder, Folder) else folder
        below = folder.fd if isinstance(folder, Folder) else None
        fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=below)
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            doing = "reading or editing this directory" if exclusive else "editing this directory in place"
            raise TargetError(f"another run is {doing}", folder, "wait until that run ends, or stop it") from None
        except OSError as error:
            if exclusive:  # some network file systems have no locks; a reader finds a changed file by its digest
                raise TargetError(f"cannot lock ({os.strerror(error.errno or 0)})", folder) from error
        yield
    finally:
        os.close(fd)


def remove_file(path: Path | Entry) -> None:
    """Remove a file if it exists."""
    with contextlib.suppress(FileNotFoundError), _open_parent(path) as (name, fd):
        os.unlink(name, dir_fd=fd)


def make_directory(path: Path | Entry, mode: int = 0o777) -> None:
    """Create a directory with permissions `mode`, reduced by the umask."""
    with _open_parent(path) as (name, fd):
        os.mkdir(name, mode, dir_fd=fd)


def restrict(folder: Folder, mode: int) -> None:
    """Remove from a directory all permissions that are not in `mode`."""
    before = os.fstat(folder.fd).st_mode & 0o7777
    if before & ~mode:
        os.fchmod(folder.fd, before & mode)


def make_directories(path: Path) -> None:
    """Create a directory and its missing parents. Does nothing if the directory exists."""
    os.makedirs(path, exist_ok=True)


def remove_directory(path: Path | Entry) -> None:
    """Remove an empty directory."""
    with _open_parent(path) as (name, fd):
        os.rmdir(name, dir_fd=fd)


def lock(folder: Folder) -> bool:
    """Lock a directory exclusively until its descriptor is closed. Returns False if another run has locked it."""
    try:
        fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def create(path: Path | Entry, mode: int = 0o666) -> int:
    """Create a file with permissions `mode`, reduced by the umask, and return a descriptor for writing."""
    with _open_parent(path) as (name, folder):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, mode, dir_fd=folder)


def create_unnamed(folder: Folder) -> int:
    """Create a file without a name in the file system of a directory, and return a descriptor for reading and writing.

    The file disappears when the descriptor is closed, even if the process is killed.
    """
    with contextlib.suppress(OSError, AttributeError):  # O_TMPFILE: not on every file system, only on Linux
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder.fd)
    name = f".swsurgery-spool-{secrets.token_hex(8)}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder.fd)
    os.unlink(name, dir_fd=folder.fd)
    return fd


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`; fewer only at the end of the file."""
    parts, left = [], size
    while left and (part := os.pread(fd, left, offset + size - left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def open_for_patching(path: Path | Entry) -> int:
    """Open an existing file for reading and for overwriting parts of it, without following a link.

    Raises OSError; for an Entry also the errors of `Entry.check_descriptor`.
    """
    with _open_parent(path) as (name, folder):
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    return path.check_descriptor(fd) if isinstance(path, Entry) else fd


def reserve(path: Path | Entry, size: int) -> None:
    """Create a file that occupies `size` bytes of the disk. Removing the file later frees the space."""
    with convert_os_errors(path):
        fd = create(path)
        try:
            os.posix_fallocate(fd, 0, size)
            sync(fd)
        finally:
            os.close(fd)


def drop_cache(fd: int) -> None:
    """Ask the kernel to drop the cached pages of a file, so that the next read comes from the disk."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def disable_cache(fd: int) -> None:
    """Make `write_at` bypass the page cache if the file system supports it.

    Writing a checkpoint through the cache would evict the pages of other programs and defer all writing to `sync`.
    """
    with contextlib.suppress(OSError, AttributeError):  # no O_DIRECT: tmpfs before Linux 6.6, other operating systems
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)


def _use_cache(fd: int) -> None:
    """Make `write_at` use the page cache again."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the current position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, without moving the current position of the descriptor.

    Several threads may write to one descriptor at the same time.
    """
    view, refused = memoryview(data), False
    while view:
        try:
            written = os.pwrite(fd, view, offset)
        except OSError as error:
            # A write that bypasses the cache must consist of whole blocks. Other writes (the end of the file, or the
            # rest after a short write) fail with EINVAL and are repeated through the cache.
            if error.errno != errno.EINVAL or refused:
                raise
            refused = True
            _use_cache(fd)
        else:
            view, offset = view[written:], offset + written


def write_file(path: Path | Entry, data: bytes, mode: int = 0o666) -> None:
    """Create a small file and sync it to the disk. Raises TargetError."""
    with convert_os_errors(path):
        fd = create(path, mode)
        try:
            write_all(fd, data)
            sync(fd)
        finally:
            os.close(fd)


def replace_file(path: Path | Entry, data: bytes, temporary: Path | Entry | None = None, mode: int = 0o666) -> None:
    """Create a small file, or replace it atomically. Raises TargetError.

    The data is first written to `temporary`, which must not exist and must be in the same directory. By default, the
    name of `temporary` is made of the name of `path` and the number of this process.
    """
    temporary = temporary or path.with_name(f".{path.name.rpartition('/')[2]}.{os.getpid()}")
    try:
        write_file(temporary, data, mode)
        with convert_os_errors(path), _open_parent(temporary) as (old, fd), _open_parent(path) as (new, to):
            os.replace(old, new, src_dir_fd=fd, dst_dir_fd=to)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_file(temporary)
        raise


def refuse_unwritable(path: Path) -> None:
    """Raise TargetError if a report cannot be written to `path`: a directory has this name, or its folder is missing.

    A command calls this function before it runs a model, so that no measurement is lost.
    """
    if path.is_dir():
        raise TargetError("this is a directory", path, "give the name of a file")
    if not path.parent.is_dir():
        raise TargetError("no such directory", path.parent, "create the directory first")
    if not os.access(path.parent, os.W_OK):
        raise TargetError("cannot write", path, "choose a place where you may write")


def write_report(path: Path, data: bytes) -> None:
    """Write a report to the path that the user named. Raises TargetError.

    A regular file is replaced atomically; if `path` is a link, the file to which it points is replaced. If `path` is a
    device, a pipe, /dev/stdout or /dev/fd/N, the data is written to it.
    """
    with convert_os_errors(path):
        if (number := _find_own_descriptor(path)) is not None:
            # A newly opened descriptor would have its own position, and later output to the original descriptor
            # would overwrite the report.
            fd = os.dup(number)
        elif os.path.exists(path) and not path.is_file():
            fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        else:
            fd = None
        if fd is not None:
            try:
                write_all(fd, data)
            finally:
                os.close(fd)
            return
    replace_file(Path(os.path.realpath(path)), data)


def _find_own_descriptor(path: Path) -> int | None:
    """Return the number of the descriptor that a path such as /dev/stdout names; None for any other path."""
    streams = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    text = os.path.abspath(path)
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/([0-9]{1,9})", text)
    return int(match[1]) if match else streams.get(text)


def replace_shared(path: Path, data: bytes, *, wait: bool = True, mode: int = 0o666) -> None:
    """Replace a file in a directory of swsurgery (such as its cache), where several runs may write the same file.

    A lock on the directory admits one run at a time. If another run has the lock, waits for that run if `wait` is True,
    and raises TargetError otherwise. The temporary file has a fixed name, so the next run removes the temporary file of
    a killed run.
    """
    with lock_directory(path.parent, exclusive=True, wait=wait):
        temporary = path.with_name(f".{path.name}.new")
        with convert_os_errors(temporary):
            remove_file(temporary)
        replace_file(path, data, temporary, mode)


def clone(base: int, new: int) -> bool:
    """Make the empty file `new` share the blocks of `base`. Returns False if the file system cannot share blocks."""
    try:
        fcntl.ioctl(new, FICLONE, base)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def copy_range(base: int, new: int, offset: int, size: int) -> int:
    """Copy up to `size` bytes at `offset` from `base` to `new`, within the kernel if the file system supports that.

    Returns the number of bytes copied, which is 0 at the end of `base`.
    """
    try:
        return os.copy_file_range(base, new, size, offset, offset)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_RANGE:
            raise
    data = os.pread(base, min(size, 1 << 20), offset)
    write_at(new, data, offset)
    return len(data)


def make_hard_link(base: Path | Entry, new: Path | Entry) -> None:
    """Create a hard link: `new` becomes a second name of the file `base`.

    This changes the ctime of the file. If `base` is an Entry, its folder ignores the ctime of the file from now on.
    """
    if isinstance(base, Entry):
        base.expect_new_ctime()
    with _open_parent(base) as (old, fd), _open_parent(new) as (name, to):
        os.link(old, name, src_dir_fd=fd, dst_dir_fd=to, follow_symlinks=False)


def sync(fd: int) -> None:
    os.fsync(fd)


def sync_directory(path: Path | Folder) -> None:
    if isinstance(path, Folder):
        os.fsync(path.fd)
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_new(old: Path | Entry, new: Path | Entry) -> None:
    """Rename a file or directory. Raises OSError (EEXIST) if `new` exists, instead of replacing it."""
    with _open_parent(old) as (name, fd), _open_parent(new) as (to_name, to):
        _rename_new(name, fd, to_name, to)


def _rename_new(old: str, fd: int | None, new: str, to: int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        here, there = (AT_FDCWD if folder is None else folder for folder in (fd, to))
        if renameat2(here, os.fsencode(old), there, os.fsencode(new), RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    # Some file systems (FUSE) do not support the flag. A plain rename would silently replace an empty directory.
    with contextlib.suppress(FileNotFoundError):
        os.stat(new, dir_fd=to, follow_symlinks=False)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(old, new, src_dir_fd=fd, dst_dir_fd=to)
