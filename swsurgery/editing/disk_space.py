"""Before a copy begins, check that it fits on the disk."""

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

    `edited` contains the names of the files with edits, which cannot be hard links. The space of files that an
    interrupted run left in the stage counts as free. Hard links and clones need no space. If there is too little space
    for copies, one file is cloned to find out if the file system supports clones. A file system that does not report
    its size is not checked.
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
    free += sum(_measure_disk_usage(stage / file.name) for file in files)
    if needed <= free or link in ("auto", "clone") and _can_clone(copied, stage):
        return
    raise NoSpace(
        f"not enough disk space: the copy needs {needed} bytes, {free} are free",
        stage.path.parent,
        "free some space, or write to another file system",
    )


def _measure_disk_usage(entry: Entry) -> int:
    """Return the number of bytes on the disk that removing this file would free."""
    try:
        status = entry.stat()
    except OSError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _can_clone(files: Sequence[BaseFile], stage: Folder) -> bool:
    """Return True if the file system can clone the largest file. The clone is temporary and is removed."""
    largest = max(files, key=lambda file: file.size)
    if not largest.is_here:
        return False
    probe = stage / STAGE_TOKEN
    with largest.require_local().open() as base, filesystem.convert_os_errors(probe):
        new = filesystem.create(probe, 0o600)
        try:
            return filesystem.clone(base.fd, new)
        finally:
            os.close(new)
            filesystem.remove_file(probe)
