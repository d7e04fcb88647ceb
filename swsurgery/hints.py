"""Guess what a user meant by a path or a file that belongs to no checkpoint. Reads a few names and refs/main."""

from __future__ import annotations

import os
import re
from pathlib import Path

NOT_THE_FILE = (
    (b"version ", "is a git-lfs pointer, not the file itself", "run git lfs pull"),
    (b"\x1f\x8b", "is a gzip file", "decompress it"),
    (b"PK\x03\x04", "is a zip file, perhaps a pickled checkpoint", "convert it to safetensors"),
    (b"GGUF", "is a GGUF file", "convert it to safetensors"),
    (b"<!", "is an HTML page, perhaps a failed download", "download it again"),
    (b"<htm", "is an HTML page, perhaps a failed download", "download it again"),
)
"""First bytes of a file -> what it is instead, and the remedy."""

_REPO_ID = re.compile(r"(?:hf:/?)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w.-]+)?)")
# A path has lost the second slash, and may be below the current directory by now.
_URL = re.compile(
    r"(?:.*/)?(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co):?/+([\w.-]+/[\w.-]+?)"
    r"(?:/(?:tree|blob|resolve)/([^/?#]+)(?:/([^?#]*))?)?/?(?:[?#].*)?"
)


def not_the_file(start: bytes) -> tuple[str, str] | None:
    """Return what a file is instead of what it should be, and the remedy, by its first bytes; None if unknown."""
    return next(((what, remedy) for magic, what, remedy in NOT_THE_FILE if start.startswith(magic)), None)


def hub_hint(given: str) -> str:
    """Return a remedy if a path that does not exist looks like a repository of the Hub or its URL, else ""."""
    if match := _URL.fullmatch(given):
        repo_id, revision, sub = match.groups()
        at = f"@{revision}" if revision and revision != "main" else ""
        return f"a repository of the Hub is written hf://{repo_id}{at}{f'/{sub}' if sub else ''}"
    if match := _REPO_ID.fullmatch(given):
        return f"a repository of the Hub is written hf://{match[1]}"
    return ""


def snapshot_hint(place: Path) -> str:
    """Return a remedy if `place` belongs to a repository's folder in a Hugging Face cache, else "".

    `place` is that folder (models--ORG--NAME), its blobs, snapshots or refs, or a file in one of them.
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


def is_cache_folder(folder: Path) -> bool:
    """Return True for a repository's folder in a Hugging Face cache, and for its blobs, snapshots and refs."""
    repo = folder if folder.name.startswith("models--") else folder.parent
    inner = folder.name in ("blobs", "snapshots", "refs") and repo.name.startswith("models--")
    return (folder is repo or inner) and (repo / "snapshots").is_dir()


def link_remedy(link: Path) -> str:
    """Return a remedy for a symbolic link among a checkpoint's files: what links into a cache means a snapshot."""
    try:
        target = Path(os.path.normpath(link.parent / os.readlink(link)))
    except OSError:  # it is gone by now
        target = link
    hint = snapshot_hint(target) or snapshot_hint(Path(os.path.realpath(link)))
    return hint or "give the directory that holds the real files"
