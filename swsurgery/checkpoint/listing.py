"""List the files of a checkpoint's directory through descriptors, each with its identity when it was listed.

Handles plain directories and snapshots of the Hugging Face cache, in which each file is a link to a file in `blobs/`.
This module must not open files, follow a link out of a cache, or write.
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
"""Names in the directory that are not part of a checkpoint: the folders of git and of download tools, and the file with
the signature of all other files."""


def open_directory(root: Path) -> Folder:
    """Open a checkpoint's directory `root`, a path without links. Raises CheckpointError if it cannot be opened."""
    try:
        return Folder.at(root)
    except OSError as error:
        raise CheckpointError(f"the directory cannot be opened ({os.strerror(error.errno or 0)})", root) from error


def is_edit_pending(folder: Folder) -> bool:
    """Return True if an edit in place was interrupted in this directory, or is running now.

    Raises TargetError if the directory cannot be read.
    """
    return any(filesystem.is_there(folder / name) for name in WORKING_FILES)


def list_files(root: Folder) -> tuple[tuple[BaseFile, ...], tuple[str, ...]]:
    """Return the regular files in `root` and its folders, sorted by name, and the names of LEFT_OUT that exist.

    Raises CheckpointError that lists every entry that a checkpoint must not contain, such as a symbolic link.
    """
    cache = _Cache(root) if is_cache_snapshot(root.path) else None
    files, faults, left_out = [], [], []
    folders = [""]
    while folders:
        for entry in _scan(root, folders.pop()):
            name, mode = entry.name, entry.mode
            if not name.isprintable():
                faults.append(f"a file has a name that cannot be printed: {name!r}")
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
    """Return the named files of a cache snapshot, as a dict from name to file.

    Other files of the snapshot may be missing. Raises CheckpointError if a named file is not downloaded.
    """
    folder = open_directory(root)
    cache = _Cache(folder)
    return {name: cache.file(folder / name) for name in names}


def find_files(root: Folder, names: Iterable[str]) -> dict[str, File]:
    """Return the files with these names that exist in a directory or a cache snapshot, as a dict from name to file.

    Raises CheckpointError if a link of a snapshot points out of its cache.
    """
    cache = _Cache(root) if is_cache_snapshot(root.path) else None
    there = [root / name for name in names if root.has_visible(name) and filesystem.is_there(root / name)]
    return {entry.name: cache.file(entry).source if cache else LocalFile(entry) for entry in there}


def _scan(root: Folder, name: str) -> list[Entry]:
    """Return the entries of the folder `name` in `root`. Raises SwsurgeryError if the folder cannot be listed."""
    try:
        return root.scan(name)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise SwsurgeryError(
            f"cannot be listed ({reason})", root.path / name, "run again when no other program writes there"
        ) from error


class _Cache:
    """The blobs of a Hugging Face cache: the files to which the links of a snapshot point.

    A link must point to a file in the folder `blobs/` of the same repository. Since huggingface_hub 1.32, this file may
    be another link, which points into the blob store that all repositories of the cache share.
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
        """Return the blob to which a link of the snapshot points.

        Raises CheckpointError if the blob is missing, or if the link points out of the cache.
        """
        outside = CheckpointError(f"is a link that points outside the Hugging Face cache: {link.name}")
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
    """Return the snapshot folder of a Hugging Face cache that is or contains `root`; None if there is none."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            return folder
    return None


def identify_cache(root: Path) -> tuple[str | None, str | None, str]:
    """Return (repo_id, commit, folder in the repository) of a path in a Hugging Face cache.

    `repo_id` is None if the repository does not contain a model, and the commit is None if the snapshot's name is not a
    commit. Returns (None, None, "") for a path outside a cache.
    """
    snapshot = find_snapshot(root)
    if snapshot is None:
        return None, None, ""
    kind, _, rest = snapshot.parent.parent.name.partition("--")
    repo_id = rest.replace("--", "/") if kind == "models" else None
    sub = "" if root == snapshot else root.relative_to(snapshot).as_posix()
    return repo_id, snapshot.name if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None, sub
