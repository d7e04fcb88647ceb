"""Whether a copy fits on the disk, asked before its first byte is written."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from swsurgery.errors import NoSpace
from swsurgery.storage import filesystem
from swsurgery.storage.files import BaseFile
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.names import STAGE_TOKEN


def refuse_without_room(files: Sequence[BaseFile], edited: Collection[str], stage: Folder, link: str) -> None:
    """Raise NoSpace if copies of these files do not fit into the stage's file system.

    Files that an interrupted run left in the stage give their room back. Hard links and clones need none; whether the
    file system can clone is tried, if it matters. A file system that does not say how large it is is not asked.
    """
    status = os.fstatvfs(stage.fd)
    if not status.f_blocks:
        return
    copied = [file for file in files if link != "hard" or file.name in edited]
    block = status.f_frsize
    needed = sum(-(-file.size // block) * block for file in copied)
    free = status.f_bavail * block
    if needed <= free:
        return
    free += sum(_room_of(stage / file.name) for file in files)
    if needed <= free or link in ("auto", "clone") and _can_clone(copied, stage):
        return
    raise NoSpace(f"not enough room: the copy needs {needed} bytes, {free} are free", stage.path.parent,
                  "free some space, or write to another file system")  # fmt: skip


def _room_of(entry: Entry) -> int:
    """Bytes of disk that removing this file would free."""
    try:
        status = entry.stat()
    except OSError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _can_clone(files: Sequence[BaseFile], stage: Folder) -> bool:
    """Try to clone the largest file, under a name that none has."""
    largest = max(files, key=lambda file: file.size)
    if not isinstance(largest.path, Entry):
        return False
    base, probe = largest.path.open(), stage / STAGE_TOKEN
    try:
        with filesystem.reported(probe):
            new = filesystem.create(probe, 0o600)
            try:
                return filesystem.clone(base, new)
            finally:
                os.close(new)
                filesystem.remove_file(probe)
    finally:
        os.close(base)
