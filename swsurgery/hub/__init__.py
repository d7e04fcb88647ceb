"""Read and write repositories of the Hugging Face Hub. Only this package imports huggingface_hub.

It contains repository names and cached files (this module), remote files (remote.py), commits, tags and pull requests
(commit.py), model cards (cards.py), limits on answers (guard.py), rules for names (names.py) and the conversion of
errors (faults.py). It must not depend on any package of swsurgery except storage. huggingface_hub provides the cache,
the offline mode, tokens and mirrors, and its environment variables configure them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swsurgery.errors import CheckpointError, HubError
from swsurgery.hub.faults import convert_errors
from swsurgery.hub.names import COMMIT, is_file_name, is_revision, read_repo_id, read_url, suggest_uri
from swsurgery.hub.remote import RemoteFile, RemoteTree, open_tree

__all__ = [
    "RemoteFile",
    "RemoteTree",
    "Uri",
    "download_checkpoint",
    "fetch",
    "find_cached",
    "get_config_error",
    "is_offline",
    "open_location",
    "open_tree",
    "parse_directory",
    "parse_field",
    "parse_location",
    "parse_uri",
]

SCHEME = "hf://"
"""Every location on the Hub starts with this text."""

_URL_STARTS = ("https://", "http://", "huggingface.co/", "hf.co/")


@dataclass(frozen=True)
class Uri:
    """A checkpoint on the Hub: hf://ORG/NAME[@REVISION][/sub]. `sub` is a folder in the repository, or ""."""

    repo_id: str
    revision: str | None
    sub: str

    def __post_init__(self) -> None:
        """Raise HubError if the revision or the folder is not a valid name: both become parts of paths in the cache."""
        if self.revision is not None and not is_revision(self.revision):
            raise HubError("this is not a valid name of a branch, a tag or a commit", self.revision)
        if self.sub and not is_file_name(self.sub):
            raise HubError("this is not a valid name of a folder in a repository", self.sub)

    @property
    def is_commit(self) -> bool:
        """True if the revision is a full commit, which always refers to the same files."""
        return COMMIT.fullmatch(self.revision or "") is not None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return SCHEME + self.repo_id + at + (f"/{self.sub}" if self.sub else "")


def parse_uri(text: str) -> Uri:
    """Parse the location of a model: hf://ORG/NAME[@REVISION][/sub]. Raises HubError, also for a dataset or a space."""
    from huggingface_hub import parse_hf_uri

    if "/" not in text.removeprefix(SCHEME).strip("/"):
        raise HubError("the name of a repository has two parts", text, "write hf://ORG/NAME")
    with convert_errors(text):
        uri = parse_hf_uri(text)
    if uri.type != "model":
        raise HubError(f"this is a {uri.type}, not a model", text)
    return Uri(uri.id, uri.revision, uri.path_in_repo.strip("/"))


def parse_location(text: str | Path) -> Path | Uri:
    """Parse the location of a checkpoint as a user types it. Raises HubError.

    It is a directory, hf://ORG/NAME[@REVISION][/sub], or the URL of a model on the Hub. The text ORG/NAME[@REVISION] is
    a repository if nothing on this machine has this path and no folder is called ORG. A Path is a directory.
    """
    typed = read_repo_id(text) if isinstance(text, str) else ""
    return parse_uri(typed) if typed else _parse_explicit(text)


def parse_field(text: str) -> Path | Uri:
    """Parse the location of a checkpoint in a manifest: a path, or hf://ORG/NAME[@REVISION][/sub]. Raises HubError."""
    if text.startswith(_URL_STARTS):
        raise HubError("a URL is not a checkpoint", text, suggest_uri(text) or "give a path, or hf://ORG/NAME")
    return _parse_explicit(text)


def _parse_explicit(text: str | Path) -> Path | Uri:
    """Parse a location that is a repository only if it says so, by hf:// or a URL. Raises HubError."""
    if isinstance(text, str) and text.startswith(SCHEME):
        return parse_uri(text)
    if isinstance(text, str) and text.startswith(_URL_STARTS):
        if uri := read_url(text):
            return parse_uri(uri)
        raise HubError("this URL is not one of a model on the Hub", text, "give a directory, or hf://ORG/NAME")
    return Path(text)


def parse_directory(text: str | Path) -> Path:
    """Parse the location of a checkpoint on this machine. Raises HubError for a location on the Hub."""
    where = _parse_explicit(text)
    if not isinstance(where, Uri):
        return where
    remedy = f"download it: hf download {where.repo_id}{_format_option(where)} --local-dir DIRECTORY"
    raise HubError("a local copy is needed", where, remedy)


def _format_option(uri: Uri) -> str:
    return f" --revision {uri.revision}" if uri.revision else ""


def is_offline() -> bool:
    """Return True if the offline mode of huggingface_hub is on."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def open_location(checkpoint: Path | Uri) -> Path | RemoteTree:
    """Choose where headers and single scalars are read: a directory, or byte ranges of files on the Hub.

    A GGUF file may be named instead: hf://ORG/NAME/FILE.gguf is a repository with this file alone.

    For a repository, this is its folder in the local cache if the offline mode is on, or if the revision is a full
    commit and the folder exists. Raises HubError, and CheckpointError if the offline mode is on and the folder is
    missing.
    """
    if not isinstance(checkpoint, Uri):
        return checkpoint
    if is_offline() or checkpoint.is_commit:
        with contextlib.suppress(CheckpointError) if not is_offline() else contextlib.nullcontext():
            return find_cached(checkpoint)
    if not _is_file(checkpoint):
        return open_tree(checkpoint.repo_id, checkpoint.revision, checkpoint.sub)
    folder, _, name = checkpoint.sub.rpartition("/")
    tree = open_tree(checkpoint.repo_id, checkpoint.revision, folder)
    if name not in tree.files:
        raise HubError("the repository has no such file", checkpoint)
    return replace(tree, files={name: tree.files[name]})


def download_checkpoint(checkpoint: Path | Uri) -> Path:
    """Return a directory with all files of a checkpoint, or a GGUF file. Downloads missing files to the cache.

    Raises HubError.
    """
    return fetch(checkpoint) if isinstance(checkpoint, Uri) else checkpoint


def find_cached(uri: Uri) -> Path:
    """Return the folder of a repository in the local cache, without opening a connection.

    If `uri` has no revision, returns the folder of the main branch as last downloaded. Raises CheckpointError if the
    folder is missing or incomplete.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(uri.repo_id, revision=uri.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        remedy = f"run hf download {uri.repo_id}{_format_option(uri)} while you are online, or give a directory"
        raise CheckpointError("the repository is not in the local Hugging Face cache", uri, remedy) from None
    except HFValidationError as error:
        raise CheckpointError(str(error), uri) from None
    return folder / uri.sub if uri.sub else folder


def fetch(uri: Uri, only: Sequence[str] | None = None) -> Path:
    """Download a repository, or one GGUF file of it, to the local cache, and return its folder or the file.

    `only` lists the files to download. By default all files are downloaded; then, if the revision is a full commit and
    its folder is complete, no request is sent. Raises HubError, CheckpointError.
    """
    from huggingface_hub import snapshot_download

    if is_offline() or uri.is_commit and only is None:
        with contextlib.suppress(CheckpointError) if not is_offline() else contextlib.nullcontext():
            cached = find_cached(uri)
            if not _is_file(uri) or cached.exists():
                return cached
    prefix = f"{uri.sub}/" if uri.sub else ""
    patterns = (
        [_escape_pattern(prefix + name) for name in only] if only is not None else [f"{prefix}*"] if prefix else None
    )
    if only is None and _is_file(uri):
        patterns = [_escape_pattern(uri.sub)]
    with convert_errors(uri):
        folder = Path(snapshot_download(uri.repo_id, revision=uri.revision, allow_patterns=patterns))
    return folder / uri.sub if uri.sub else folder


def _is_file(uri: Uri) -> bool:
    """Return True if a location names one GGUF file of a repository, and not a folder."""
    return uri.sub.lower().endswith(".gguf")


def _escape_pattern(name: str) -> str:
    """Build a pattern for `allow_patterns` of huggingface_hub that matches only this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def get_config_error() -> type[Exception]:
    """Return the exception that transformers passes on from huggingface_hub for contradictory values in config.json."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError
