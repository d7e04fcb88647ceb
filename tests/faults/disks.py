"""File systems of our own on loop devices, and pulling the plug of one.

The power cut is the file system's own shutdown ioctl: what its journal does not hold yet is gone. It needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["ext4", "xfs", "btrfs", "tmpfs"]
Cut = Literal["all lost", "journal kept", "weights kept", "weights begun"]

CUTS: tuple[Cut, ...] = ("all lost", "journal kept", "weights kept", "weights begun")
"""What was on the disk by chance when the power went: nothing but what was synced; also the file system's journal;
or the data of the weight files, which the kernel may write at any time; or the journal and their first page."""

PAGE = 4096

SIZES = {"ext4": 64, "xfs": 320, "btrfs": 128, "tmpfs": 64}
"""MiB of an image: the smallest that each can do, with some room."""

_SYNC_FILE_RANGE_ALL = 7


def missing(kind: Kind) -> str:
    """Why there is no such disk here; empty where there is."""
    if os.geteuid():
        return "only root can mount"
    if kind == "tmpfs":
        return ""
    if not shutil.which(f"mkfs.{kind}"):
        return f"mkfs.{kind} is not installed"
    if not os.path.exists("/dev/loop-control"):
        return "no loop devices"
    with open("/proc/filesystems") as known:
        return "" if kind in known.read().split() else f"the kernel has no {kind}"


def no_power_cut(kind: Kind) -> str:
    """Why the power of such a disk cannot be cut here; empty where it can."""
    return missing(kind) or ("" if shutil.which("xfs_io") else "xfs_io is not installed")


@dataclass(frozen=True)
class Disk:
    """One mounted file system. `device` is that of its image, the same as long as it lives, for what is remembered of
    files goes by their device; empty for tmpfs."""

    kind: Kind
    mount: Path
    device: str

    def cut(self, how: Cut = "all lost") -> None:
        """Cut the power, and start again."""
        if how.startswith("weights"):
            self._write_weights_back(PAGE if how == "weights begun" else 0)
        command = "shutdown -f" if how in ("journal kept", "weights begun") else "shutdown"
        _do("xfs_io", "-x", "-c", command, str(self.mount))
        self._again()

    def sync(self) -> None:
        _do("sync", "-f", str(self.mount))

    def read_only(self, on: bool) -> None:
        _do("mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.mount))

    def free(self) -> int:
        """Bytes that a writer still gets."""
        status = os.statvfs(self.mount)
        return status.f_bavail * status.f_frsize

    def fill(self, leaving: int) -> None:
        """Take all space but about `leaving` bytes, with a file named ballast."""
        self.empty()
        self.sync()
        size = self.free() - leaving
        with open(self.mount / "ballast", "wb") as ballast:
            while size > 0:
                try:
                    os.posix_fallocate(ballast.fileno(), ballast.seek(0, os.SEEK_END), size)
                    ballast.truncate(ballast.seek(0, os.SEEK_END))
                    break
                except OSError:  # the last blocks are the file system's own
                    size -= 1 << 16
        self.sync()

    def empty(self) -> None:
        (self.mount / "ballast").unlink(missing_ok=True)

    def _write_weights_back(self, size: int) -> None:
        """The first `size` bytes of each weight file; 0 means all of them."""
        libc = ctypes.CDLL(None)
        for path in self.mount.rglob("*.safetensors"):
            fd = os.open(path, os.O_RDONLY)
            libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(size), _SYNC_FILE_RANGE_ALL)
            os.close(fd)

    def _again(self) -> None:
        _unmount(self.mount)
        _do("mount", self.device, str(self.mount))


@contextlib.contextmanager
def disk(kind: Kind, folder: Path, size: int = 0) -> Iterator[Disk]:
    """A new file system in `folder`, gone when the block ends. `size` in MiB, else the smallest that will do."""
    mount, size = folder / f"{kind}-mount", size or SIZES[kind]
    mount.mkdir(parents=True)
    image, device = folder / f"{kind}.image", ""
    if kind == "tmpfs":
        _do("mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(mount))
    else:
        with open(image, "wb") as file:
            file.truncate(size << 20)
        quiet = ["-q", "-F"] if kind == "ext4" else ["-q", "-f"]
        _do(f"mkfs.{kind}", *quiet, str(image))
        device = _do("losetup", "--find", "--show", str(image))
        _do("mount", device, str(mount))
    try:
        yield Disk(kind, mount, device)
    finally:
        _unmount(mount)
        mount.rmdir()
        if device:
            _do("losetup", "--detach", device)
            image.unlink()


def _unmount(mount: Path) -> None:
    for _ in range(50):  # whoever was just killed may still be leaving
        if subprocess.run(["umount", str(mount)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    _do("umount", str(mount))


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
