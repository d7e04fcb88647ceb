"""sha256 of files that were hashed before and have not changed since: same device, inode, size, mtime and ctime.

Without the ctime, which nobody can set, an archive whose files all have one mtime could put other weights into the
same inode unseen. A hard link made or removed moves it, too, and costs one more hash. Kept in the user's cache
directory; a lost or damaged cache costs time, never correctness.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from platformdirs import user_cache_path

from swsurgery import fsops
from swsurgery.errors import TargetError

MAX_ENTRIES = 20_000

CLOCK_TICK = 2.0
"""Seconds between two mtimes that a file system can tell apart, at worst (FAT)."""


class DigestCache:
    """Digests by the identity of the file."""

    def __init__(self, path: Path | None = None):
        self._path = path or user_cache_path("swsurgery") / "digests.json"
        self._entries: dict[str, str] = {}
        self._changed = False
        try:
            entries = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return
        if isinstance(entries, dict):
            self._entries = {k: v for k, v in entries.items() if isinstance(v, str) and len(v) == 64}

    def get(self, path: Path) -> str | None:
        return self._entries.get(_identity(path))

    def put(self, path: Path, digest: str) -> None:
        if time.time() - os.stat(path).st_mtime < CLOCK_TICK:
            return  # it could change again without its mtime moving
        self._entries[_identity(path)] = digest
        self._changed = True

    def save(self) -> None:
        """Write the cache, or go without it where it cannot be written."""
        if not self._changed:
            return
        newest = dict(list(self._entries.items())[-MAX_ENTRIES:])
        try:
            fsops.make_directories(self._path.parent)
            fsops.replace_shared(self._path, json.dumps(newest, indent=0).encode(), wait=False)
        except (OSError, TargetError):
            return
        self._changed = False


def _identity(path: Path) -> str:
    s = os.stat(path)
    return f"{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}"
