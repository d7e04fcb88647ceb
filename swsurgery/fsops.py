"""Every mutating system call that swsurgery makes, and nowhere else.

Functions are thin: one call each, repeated where the kernel may do less than it was asked. An OSError
leaves this room as a TargetError that names the path and a remedy; a failed fsync is final and never
retried, for a second try may succeed with the data gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from swsurgery.errors import TargetError

FICLONE = 0x40049409
"""ioctl of Linux: make a file share all blocks of another one (btrfs, xfs)."""

RENAME_NOREPLACE = 1
AT_FDCWD = -100
_CANNOT_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
_CANNOT_COPY_RANGE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS}
_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another file system",
    errno.EDQUOT: "free some of the quota, or write to another file system",
    errno.EACCES: "write where you may",
    errno.EPERM: "write where you may",
    errno.EROFS: "write to a file system that is not read-only",
    errno.ENOENT: "make the directory first",
    errno.EMFILE: "raise the limit of open files",
    errno.EXDEV: "hard links and clones stay on one file system: use --link copy",
}


@contextlib.contextmanager
def reported(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the block into a TargetError about `path`."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "")
        raise TargetError(f"cannot write ({os.strerror(error.errno or 0)})", path, remedy) from error


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A locked, empty directory beside `target`; renamed to `target`, durably, when the block ends well.

    On any exception it is removed, so `target` is whole or absent. What a killed run left behind under the
    same name is cleaned up here. Raises TargetError where the target exists, cannot be made, or another run
    is writing it.
    """
    target = Path(os.path.abspath(target))
    stage = target.parent / f".{target.name}.partial"
    _refuse_existing(target)
    with reported(target):
        lock = _locked_directory(stage, target)
    try:
        try:
            _refuse_existing(target)
            with reported(stage):
                _empty(stage)
            yield stage
            with reported(target):
                for folder, _, _ in os.walk(stage):
                    sync_directory(Path(folder))
                rename_new(stage, target)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(stage)
            raise
        with reported(target):
            sync_directory(target.parent)
    finally:
        os.close(lock)  # the lock dies with the descriptor, so a killed run leaves none


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise TargetError("the target exists", target, "give another -o, or remove it")


def _locked_directory(stage: Path, target: Path) -> int:
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(stage)
        fd = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(stage)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise TargetError("another run is writing it", target, "wait for it, or stop it") from None
        except FileNotFoundError:
            pass  # its owner renamed or removed it between our two calls
        os.close(fd)


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def make_directories(path: Path) -> None:
    os.makedirs(path, exist_ok=True)


def create(path: Path) -> int:
    """A new file, open for writing; its mode follows the umask."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def bypass_cache(fd: int) -> None:
    """Have `write_all` write past the page cache, where the file system can.

    A checkpoint written through the cache costs a page of memory for each page, pushes out what others had
    there, and leaves all its writing to `sync`.
    """
    with contextlib.suppress(OSError, AttributeError):  # tmpfs before Linux 6.6; other systems
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)


def _use_cache(fd: int) -> bool:
    """Undo `bypass_cache`. False where there was nothing to undo."""
    flags, direct = fcntl.fcntl(fd, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


def write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError as error:
            # Past the cache only whole blocks can be written, so the file's end, and what follows a short write,
            # are refused and go through it.
            if error.errno != errno.EINVAL or not _use_cache(fd):
                raise


def write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def write_file(path: Path, data: bytes) -> None:
    """A new small file, durable when this returns."""
    with reported(path):
        fd = create(path)
        try:
            write_all(fd, data)
            sync(fd)
        finally:
            os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """A small file that may exist already, replaced as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_file(temporary, data)
        with reported(path):
            os.replace(temporary, path)
    except TargetError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def clone(base: int, new: int) -> bool:
    """Let the empty file `new` share the blocks of `base`. False where the file system cannot."""
    try:
        fcntl.ioctl(new, FICLONE, base)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def copy_range(base: int, new: int, offset: int, size: int) -> int:
    """Copy up to `size` bytes at `offset` inside the kernel; returns how many, 0 at the end of the file."""
    try:
        return os.copy_file_range(base, new, size, offset, offset)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_RANGE:
            raise
    data = os.pread(base, min(size, 1 << 20), offset)
    write_at(new, data, offset)
    return len(data)


def hard_link(base: Path, new: Path) -> None:
    os.link(base, new, follow_symlinks=False)


def sync(fd: int) -> None:
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_new(old: Path, new: Path) -> None:
    """Rename, and never onto something that is there. Raises OSError (EEXIST)."""
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        if renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    # Some file systems (FUSE) do not know the flag. Plain rename would silently replace an empty directory.
    if os.path.lexists(new):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(old, new)
