"""Cache sha256 digests of files between runs, keyed by device, inode, size, mtime and ctime of the file.

A matching key does not prove that the file is unchanged: a write through an existing memory map changes none of the
five numbers, and a file of another disk image mounted at the same path can have the same five numbers. A cached digest
is therefore never compared with an expected digest. Only `apply --reuse-digests` copies cached digests into a record,
and the record marks them as unverified. If the cache is lost, files are hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

from platformdirs import user_cache_path

from swsurgery.errors import SwsurgeryError
from swsurgery.storage import filesystem
from swsurgery.storage.files import LocalFile, read_at_most

MAX_ENTRIES = 20_000
"""Maximum number of digests in the cache file. If there are more, the oldest are dropped."""

MAX_CACHE = 8 << 20
"""Maximum size of the cache file in bytes; MAX_ENTRIES digests need about 3 MB."""

CLOCK_TICK = 2.0
"""Resolution of mtime on FAT, in seconds: the coarsest of all common file systems."""


class DigestCache:
    """Digests keyed by device, inode, size, mtime and ctime, in the file `path` or in the user's cache directory.

    The cache file is read at the first lookup and again when new digests are saved. It must be a regular
    file that belongs to this user, is writable by nobody else, and matches the checksum that it contains; any other
    file is ignored.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or user_cache_path("swsurgery") / "digests.json"
        self._new: dict[str, str] = {}
        self._read: dict[str, str] | None = None

    def get(self, status: os.stat_result) -> str | None:
        """Return the cached digest of the file whose stat result is `status`, or None if the digest is not cached."""
        if self._read is None:
            self._read = _load(self._path)
        return self._read.get(_make_identity(status))

    def put(self, status: os.stat_result, digest: str, started: float) -> None:
        """Add the digest of a file. `save` writes it to the cache file.

        `status` is the stat result of the hashed descriptor, and `started` the time at which hashing began, in seconds
        since 1970. A file modified less than CLOCK_TICK before `started` is not added, because a later change could
        leave its mtime unchanged.
        """
        if started - status.st_mtime >= CLOCK_TICK:
            self._new[_make_identity(status)] = digest

    def save(self) -> None:
        """Write the added digests to the cache file. Raises no error if the file cannot be written."""
        if not self._new:
            return
        entries = {k: v for k, v in _load(self._path).items() if k not in self._new} | self._new
        entries = dict(list(entries.items())[-MAX_ENTRIES:])
        document = {"sha256": _compute_checksum(entries), "digests": entries}
        try:
            filesystem.make_directories(self._path.parent)
            filesystem.replace_shared(self._path, json.dumps(document, indent=0).encode(), wait=False, mode=0o600)
        except (OSError, SwsurgeryError):
            return
        self._new = {}
        self._read = None


def _load(path: Path) -> dict[str, str]:
    """Read the digests in a cache file, by key. Returns an empty dict if the file cannot be read or trusted."""
    try:
        with LocalFile(path).open() as file:
            status = os.fstat(file.fd)
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return {}
            raw = read_at_most(file, MAX_CACHE + 1)
        document = json.loads(raw) if len(raw) <= MAX_CACHE else None
    except (OSError, SwsurgeryError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    entries = document.get("digests")
    if not isinstance(entries, dict) or document.get("sha256") != _compute_checksum(entries):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, str) and len(v) == 64}


def _compute_checksum(entries: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _make_identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
