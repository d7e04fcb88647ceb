"""Suggest a remedy for a path that is not a checkpoint but in a Hugging Face cache.

Reads only the names of files and directories, and the file refs/main of a cached repository.
"""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

MAX_NEIGHBOURS = 1000
"""Maximum number of entries of a directory that are compared with a misspelled name."""


def suggest_snapshot(place: Path) -> str:
    """Return a remedy that names a snapshot, for a path in a Hugging Face cache; "" if there is none to suggest.

    `place` may be the folder of a cached repository (models--ORG--NAME), its folder blobs, snapshots or refs, or a
    file at most two folders deeper.
    """
    repo = next((p for p in (place, *place.parents[:3]) if p.name.startswith("models--")), None)
    if repo is None or not (repo / "snapshots").is_dir():
        return ""
    found = sorted(entry.name for entry in os.scandir(repo / "snapshots") if entry.is_dir())
    if place.parent.name in found and place.parent.parent == repo / "snapshots":
        return f"give the snapshot: {place.parent}"
    main = repo / "refs" / "main"
    commit = main.read_text("utf-8", "replace").strip() if main.is_file() and main.stat().st_size < 100 else ""
    if len(found) == 1 or commit in found:
        return f"give the snapshot: {repo / 'snapshots' / (commit if commit in found else found[0])}"
    return f"give one of the {len(found)} snapshots in {repo / 'snapshots'}" if found else ""


def suggest_neighbour(path: Path) -> str:
    """Return a remedy that names a directory beside `path`, which does not exist; "" if no name is similar.

    At most MAX_NEIGHBOURS entries of the parent directory are compared.
    """
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, MAX_NEIGHBOURS) if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name[:100], names, 1, 0.75)
    return f"did you mean {path.parent / near[0]}?" if near else ""


def is_cache_folder(folder: Path) -> bool:
    """Return True if `folder` is a repository's folder in a Hugging Face cache, or its blobs, snapshots or refs."""
    repo = folder if folder.name.startswith("models--") else folder.parent
    inner = folder.name in ("blobs", "snapshots", "refs") and repo.name.startswith("models--")
    return (folder is repo or inner) and (repo / "snapshots").is_dir()


def explain_link(link: Path) -> str:
    """Return a remedy for a symbolic link in the directory of a checkpoint.

    If the link points into a Hugging Face cache, the remedy names a snapshot to use instead of the directory.
    """
    try:
        target = Path(os.path.normpath(link.parent / os.readlink(link)))
    except OSError:  # it was removed meanwhile
        target = link
    hint = suggest_snapshot(target) or suggest_snapshot(Path(os.path.realpath(link)))
    return hint or "give the directory that holds the real files"
