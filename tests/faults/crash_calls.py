"""The system calls of swsurgery.filesystem seen from inside this process: written down, counted, and made to go wrong.

`watching` puts stand-ins for `os`, `fcntl` and `ctypes` into that module. A call that they do not know is an error, so
nothing that changes a disk goes by unseen.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from faults.crash_fs import Disk, Place, Start, Step
from swsurgery.storage import filesystem

LOOKING = {
    "fchmod", "fspath", "fsencode", "fstat", "geteuid", "getpid", "lstat", "path", "pread", "scandir", "stat",
    "strerror", "walk",
}  # fmt: skip
"""What filesystem may call, or have from `os`, that changes nothing on a disk."""


@dataclass(frozen=True)
class Call:
    """One call of a run: the `index`-th, by its name, on `path`. `done` once it was made."""

    index: int
    name: str
    path: str
    done: bool = False


Trouble = Callable[[Call], None]
"""Told of each call before and after it is made; what it raises, the call raises."""


@dataclass
class Watch:
    """What a run does to the tree `root`. `half` makes every transfer a short one; `clones` lets the file system clone.

    `steps` are the changes, `calls` all calls, `outside` the changes that were made elsewhere.
    """

    root: Path
    trouble: Trouble | None = None
    half: bool = False
    clones: bool = False
    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = Start.of(self.root)
        self._nodes = dict(self.start.numbers)
        self._count = len(self.start.contents)
        self._opened: dict[int, os.stat_result] = {}
        self._errno = 0
        self.asleep = False

    def stand_ins(self) -> dict[str, object]:
        known = {n: getattr(os, n) for n in dir(os) if n in LOOKING or n.startswith(("O_", "POSIX_"))}
        made = (
            self.open, self.close, self.write, self.pwrite, self.posix_fallocate, self.posix_fadvise,
            self.copy_file_range, self.mkdir, self.makedirs, self.unlink, self.rmdir, self.rename, self.replace,
            self.link, self.fsync,
        )  # fmt: skip
        locks = {name: getattr(fcntl, name) for name in dir(fcntl) if name.isupper()} | {"fcntl": fcntl.fcntl}
        library = SimpleNamespace(renameat2=self._renameat2)
        return {
            "os": SimpleNamespace(**known | {m.__name__: m for m in made}),
            "fcntl": SimpleNamespace(**locks, flock=self.flock, ioctl=self.ioctl),
            "ctypes": SimpleNamespace(CDLL=lambda *_, **__: library, get_errno=lambda: self._errno),
        }

    def close_left_open(self) -> None:
        """What a process that ends does: a signal may strike between a call and the keeping of what it returned."""
        for fd, status in self._opened.items():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), status):  # else it is closed, and its number another file's
                    os.close(fd)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        path = _whole(path, dir_fd)
        new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        with self._called("open", path):
            fd = os.open(path, flags, mode)
            self._opened[fd] = os.fstat(fd)
            if new:
                self._made(path, b"")
        return fd

    def close(self, fd: int) -> None:
        self._opened.pop(fd, None)  # its number may soon be another's
        os.close(fd)

    def write(self, fd: int, data: memoryview) -> int:
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        with self._called("write", fd):
            size = os.write(fd, self._some(data))
            self._changed(fd, "write", offset, bytes(data[:size]))
        return size

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        with self._called("pwrite", fd):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT and (len(data) % 512 or offset % 512):
                raise OSError(errno.EINVAL, "past the cache only whole sectors are written")  # not so on tmpfs
            size = os.pwrite(fd, self._some(data), offset)
            self._changed(fd, "write", offset, bytes(data[:size]))
        return size

    def copy_file_range(self, source: int, target: int, count: int, at: int, to: int) -> int:
        with self._called("copy_file_range", target):
            data = self._some(memoryview(os.pread(source, count, at)))
            os.pwrite(target, data, to)
            self._changed(target, "write", to, bytes(data))
        return len(data)

    def ioctl(self, target: int, request: int, source: int) -> None:
        with self._called("clone", target):
            if not self.clones:
                raise OSError(errno.EOPNOTSUPP, "no clones here")
            data = os.pread(source, os.fstat(source).st_size, 0)
            os.pwrite(target, data, 0)
            self._changed(target, "write", 0, data)

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        with self._called("fallocate", fd):
            os.ftruncate(fd, max(offset + size, os.fstat(fd).st_size))  # on tmpfs the real one costs its memory
            self._changed(fd, "grow", offset + size)

    def posix_fadvise(self, fd: int, offset: int, size: int, advice: int) -> None:
        """Pages that are clean are read again from the disk, also those that a failed fsync has left clean."""
        with self._called("fadvise", fd):
            node, path = self._nodes.get(os.fstat(fd).st_ino), Path(os.readlink(f"/proc/self/fd/{fd}"))
            content = None if node is None else self.disk().content(node)
            if isinstance(content, bytes) and path.read_bytes() != content:
                path.write_bytes(content)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        path = _whole(path, dir_fd)
        with self._called("mkdir", path):
            os.mkdir(path, mode)
            self._made(path, None)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        path = Path(path)
        if path.is_dir() and exist_ok:
            return
        if not path.parent.is_dir():
            self.makedirs(path.parent, exist_ok)
        self.mkdir(path)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", os.unlink, _whole(path, dir_fd))

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", os.rmdir, _whole(path, dir_fd))

    def rename(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._move("rename", os.rename, _whole(old, src_dir_fd), _whole(new, dst_dir_fd))

    def replace(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._move("replace", os.replace, _whole(old, src_dir_fd), _whole(new, dst_dir_fd))

    def _renameat2(self, here: int, old: bytes, there: int, new: bytes, flags: int) -> int:
        library = ctypes.CDLL(None, use_errno=True)

        def rename(old: Path, new: Path) -> None:
            if library.renameat2(filesystem.AT_FDCWD, os.fsencode(old), filesystem.AT_FDCWD, os.fsencode(new), flags):
                raise OSError(ctypes.get_errno(), "renameat2")

        try:
            self._move("renameat2", rename, _whole(os.fsdecode(old), here), _whole(os.fsdecode(new), there))
        except OSError as error:
            self._errno = error.errno
            return -1
        return 0

    def link(
        self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:  # fmt: skip
        old, new = _whole(old, src_dir_fd), _whole(new, dst_dir_fd)
        with self._called("link", new):
            os.link(old, new, follow_symlinks=follow_symlinks)
            self._made(new, Path(old))

    def fsync(self, fd: int) -> None:
        node = self._nodes.get(os.fstat(fd).st_ino)
        try:
            with self._called("fsync", fd):
                if node is not None:
                    self.steps.append(Step("sync", node))
        except OSError:
            if node is not None:
                self.steps.append(Step("sync failed", node))
            raise

    def flock(self, fd: int, operation: int) -> None:
        with self._called("flock", fd):
            fcntl.flock(fd, operation)

    def disk(self) -> Disk:
        """The disk as it is now."""
        disk = Disk(self.start, "journal")
        for step in self.steps:
            disk.play(step)
        return disk

    @contextlib.contextmanager
    def _called(self, name: str, on: Any) -> Iterator[None]:
        path = os.readlink(f"/proc/self/fd/{on}") if isinstance(on, int) else os.fspath(on)
        call = Call(len(self.calls), name, path)
        if not self.asleep:
            self.calls.append(call)
            if self.trouble:
                self.trouble(call)
        try:
            yield
        finally:
            if not self.asleep and self.trouble:
                self.trouble(Call(call.index, name, path, done=True))

    def _some(self, data: memoryview) -> memoryview:
        return data[: max(1, len(data) // 2)] if self.half else data

    def _place(self, path: Any) -> Place | None:
        path = Path(os.path.abspath(path))
        folder = self._nodes.get(os.stat(path.parent).st_ino) if path.is_relative_to(self.root) else None
        if folder is None:
            self.outside.append(str(path))
            return None
        return folder, path.name

    def _made(self, path: Any, content: bytes | Path | None) -> None:
        number = os.lstat(path).st_ino
        if place := self._place(path):
            self._nodes[number], self._count = self._count, self._count + 1
            self.steps.append(Step("make", self._nodes[number], place, content=content, number=number))

    def _changed(self, fd: int, kind: Any, offset: int, data: bytes = b"") -> None:
        node = self._nodes.get(os.fstat(fd).st_ino)
        if node is None:
            self.outside.append(os.readlink(f"/proc/self/fd/{fd}"))
        else:
            self.steps.append(Step(kind, node, offset=offset, data=data))

    def _remove(self, name: str, call: Callable[[Any], None], path: Any) -> None:
        with self._called(name, path):
            number = os.lstat(path).st_ino
            call(path)
            if place := self._place(path):
                self.steps.append(Step("remove", self._nodes[number], place))

    def _move(self, name: str, call: Callable[[Any, Any], None], old: Any, new: Any) -> None:
        with self._called(name, old):
            number = os.lstat(old).st_ino
            call(old, new)
            place, to = self._place(old), self._place(new)
            if place and to:
                self.steps.append(Step("move", self._nodes[number], place, to))


def _whole(path: Any, folder: int | None) -> Any:
    """The path that a name below the directory of a descriptor has."""
    if folder in (None, filesystem.AT_FDCWD):
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Within the block `watch` sees and does what filesystem calls."""
    kept = {name: getattr(filesystem, name) for name in ("os", "fcntl", "ctypes")}
    vars(filesystem).update(watch.stand_ins())
    try:
        yield watch
    finally:
        vars(filesystem).update(kept)
        watch.close_left_open()
