"""List the files of a checkpoint's directory through descriptors, each with its identity at that moment.

Handles plain directories and snapshots of the Hugging Face cache, whose files are links into `blobs/`. This module must
not open files, follow a link out of a cache, or write.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from swsurgery.checkpoint.hints import explain_link
from swsurgery.checkpoint.weight_files import format_some
from swsurgery.errors import CheckpointError, SwsurgeryError
from swsurgery.storage import filesystem
from swsurgery.storage.files import BaseFile, File, LocalFile
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.names import SHARD_NAME, STAGE_TOKEN, WORKING_FILES

LEFT_OUT = (".git", ".cache", "model.sig")
"""Top-level names that are not part of a checkpoint: the folders of download and version control tools, and the
signature, which covers the other files."""


def open_directory(root: Path) -> Folder:
    """Open a checkpoint's directory and keep its descriptor. `root` contains no links. Raises CheckpointError."""
    try:
        return Folder.at(root)
    except OSError as error:
        raise CheckpointError(f"cannot be opened ({os.strerror(error.errno or 0)})", root) from error


def list_files(root: Folder) -> tuple[tuple[BaseFile, ...], tuple[str, ...]]:
    """List the regular files below `root`, sorted by name, and the names in LEFT_OUT that exist.

    Raises CheckpointError with every entry that a checkpoint must not contain.
    """
    cache = _Cache(root) if is_cache_snapshot(root.path) else None
    files, faults, left_out = [], [], []
    folders = [""]
    while folders:
        for entry in _scan(root, folders.pop()):
            name, mode = entry.name, entry.mode
            if not name.isprintable():
                faults.append(f"has a name that cannot be printed: {name!r}")
            elif name in WORKING_FILES or name == STAGE_TOKEN:
                pass
            elif name in LEFT_OUT:
                left_out.append(name)
            elif stat.S_ISDIR(mode):
                if SHARD_NAME.fullmatch(name):
                    faults.append(f"is a directory, not a shard: {name}")
                folders.append(name)
            elif cache and stat.S_ISLNK(mode):
                try:
                    files.append(cache.file(entry))
                except CheckpointError as error:
                    faults += error.faults
            elif stat.S_ISREG(mode) and entry.identity:
                files.append(BaseFile(name, LocalFile(entry), entry.identity.size))
            elif stat.S_ISLNK(mode):
                faults.append(f"is a symbolic link: {name} ({explain_link(root.path / name)})")
            else:
                faults.append(f"is not a regular file: {name}")
    if faults:
        raise CheckpointError.of(f"{fault} in {root}" for fault in format_some(sorted(faults)))
    return tuple(sorted(files, key=lambda f: f.name)), tuple(sorted(left_out))


def list_cached_files(root: Path, names: Iterable[str]) -> dict[str, BaseFile]:
    """Find the named files of a cache snapshot, which may be incomplete otherwise. Raises CheckpointError."""
    folder = open_directory(root)
    cache = _Cache(folder)
    return {name: cache.file(folder / name) for name in names}


def find_files(root: Folder, names: Iterable[str]) -> dict[str, File]:
    """Map those of `names` that exist in a directory or in a cache snapshot to their entries.

    Raises CheckpointError for a link of a snapshot that leads out of its cache.
    """
    cache = _Cache(root) if is_cache_snapshot(root.path) else None
    there = [root / name for name in names if filesystem.is_there(root / name)]
    return {entry.name: cache.file(entry).source if cache else LocalFile(entry) for entry in there}


def _scan(root: Folder, name: str) -> list[Entry]:
    """List the entries of a folder below `root`. Raises CheckpointError."""
    try:
        return root.scan(name)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise SwsurgeryError(
            f"cannot be listed ({reason})", root.path / name, "run again when no other program writes there"
        ) from error


class _Cache:
    """The blobs to which the links of a cache snapshot point.

    A link must end in the `blobs/` of the same repository. Since huggingface_hub 1.32 such a blob may itself be a link
    into the blob store that all repositories of the cache share.
    """

    def __init__(self, snapshot: Folder):
        folder = find_snapshot(snapshot.path)
        if folder is None:
            raise CheckpointError("is not in a Hugging Face cache", snapshot)
        repo = folder.parent.parent
        self.blobs = open_directory(repo / "blobs")
        store = repo.parent / "blobs"
        self.store = open_directory(store) if store.is_dir() and not store.is_symlink() else None

    def file(self, link: Entry) -> BaseFile:
        """Return the blob to which a link of the snapshot points. Raises CheckpointError."""
        outside = CheckpointError(f"links to a place outside its own cache: {link.name}")
        try:
            target = Path(os.path.normpath(link.path.parent / link.readlink()))
            if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name):
                raise outside
            if Path(os.path.realpath(target.parent)) != self.blobs.path:
                raise outside
            blob = self.blobs / target.name
            status = blob.stat()
            if stat.S_ISLNK(status.st_mode):
                real = Path(os.path.normpath(self.blobs.path / blob.readlink()))
                if self.store is None:
                    raise outside
                inside = os.path.relpath(Path(os.path.realpath(real.parent), real.name), self.store.path)
                if not re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{64}", inside):
                    raise outside
                blob = self.store / inside
                status = blob.stat()
        except OSError:
            raise CheckpointError(f"is not fully downloaded: {link.name}") from None
        if not stat.S_ISREG(status.st_mode):
            raise outside
        file = LocalFile(Entry.from_status(blob.folder, blob.name, status))
        return BaseFile(link.name, file, status.st_size, target.name if len(target.name) == 64 else None)


def is_cache_snapshot(root: Path) -> bool:
    """Return True if `root` is a snapshot folder of a Hugging Face cache, or is inside one."""
    return find_snapshot(root) is not None


def find_snapshot(root: Path) -> Path | None:
    """Return the snapshot folder that is `root` or contains it; None outside a cache."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            return folder
    return None


def identify_cache(root: Path) -> tuple[str | None, str | None, str]:
    """Return (repo_id, commit, folder in the repository) of a path in a Hugging Face cache.

    Returns (None, None, "") for a path outside a cache.
    """
    snapshot = find_snapshot(root)
    if snapshot is None:
        return None, None, ""
    kind, _, rest = snapshot.parent.parent.name.partition("--")
    repo_id = rest.replace("--", "/") if kind == "models" else None
    sub = "" if root == snapshot else root.relative_to(snapshot).as_posix()
    return repo_id, snapshot.name if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None, sub
