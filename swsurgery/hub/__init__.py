"""The only rooms that know huggingface_hub.

    __init__.py   names of repositories, and their files on this machine
    remote.py     files of a repository read by ranges
    commit.py     the only writing: one commit, tags, pull requests
    cards.py      model cards as the Hub reads them
    guard.py      what a Hub may answer: names, sizes, time, and where the token goes
    names.py      which names may become parts of paths
    faults.py     what the library raises -> one line of ours

Cache, offline mode, tokens and mirrors are the library's own, with its environment variables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swsurgery.errors import CheckpointError, HubError
from swsurgery.hub.faults import told
from swsurgery.hub.names import COMMIT, hub_hint, is_file_name, is_revision
from swsurgery.hub.remote import RemoteFile, Repo, open_repo

__all__ = [
    "RemoteFile",
    "Repo",
    "Uri",
    "cached",
    "config_error",
    "directory",
    "fetch",
    "local",
    "named",
    "open_repo",
    "parse_uri",
    "place",
]

SCHEME = "hf://"


@dataclass(frozen=True)
class Uri:
    """hf://ORG/NAME[@REVISION][/sub]"""

    repo_id: str
    revision: str | None
    sub: str

    def __post_init__(self) -> None:
        """Raise HubError for a revision or a folder that would lead out of the cache."""
        if self.revision is not None and not is_revision(self.revision):
            raise HubError("no name of a branch, a tag or a commit", self.revision)
        if self.sub and not is_file_name(self.sub):
            raise HubError("no name of a folder in a repository", self.sub)

    @property
    def is_commit(self) -> bool:
        """Whether the revision can never mean anything else."""
        return COMMIT.fullmatch(self.revision or "") is not None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return SCHEME + self.repo_id + at + (f"/{self.sub}" if self.sub else "")


def parse_uri(text: str) -> Uri:
    """`hf://ORG/NAME[@REVISION][/sub]` of a model. Raises HubError."""
    from huggingface_hub import parse_hf_uri

    with told(text):
        uri = parse_hf_uri(text)
    if uri.type != "model":
        raise HubError(f"a {uri.type}, not a model", text)
    return Uri(uri.id, uri.revision, uri.path_in_repo.strip("/"))


def named(text: str | Path) -> Path | Uri:
    """What a user means by a checkpoint: a directory, or hf://ORG/NAME[@REVISION][/sub]. Raises HubError."""
    if isinstance(text, str) and text.startswith(SCHEME):
        return parse_uri(text)
    if isinstance(text, str) and text.startswith(("https://", "http://", "huggingface.co/", "hf.co/")):
        raise HubError("a URL is no checkpoint", text, hub_hint(text) or "give a directory, or hf://ORG/NAME")
    return Path(text)


def directory(text: str) -> Path:
    """A checkpoint that has to lie on this machine. Raises HubError for one on the Hub."""
    where = named(text)
    if isinstance(where, Path):
        return where
    remedy = f"download it: hf download {where.repo_id}{_flag(where)} --local-dir DIRECTORY"
    raise HubError("needs a local copy", where, remedy)


def _flag(uri: Uri) -> str:
    return f" --revision {uri.revision}" if uri.revision else ""


def offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def place(checkpoint: Path | Uri) -> Path | Repo:
    """Where to read headers and single scalars: a repository by ranges, unless it lies in the local cache at the very
    commit, or the offline mode is on. Raises HubError."""
    if isinstance(checkpoint, Path):
        return checkpoint
    if offline() or checkpoint.is_commit:
        with contextlib.suppress(CheckpointError) if not offline() else contextlib.nullcontext():
            return cached(checkpoint)
    return open_repo(checkpoint.repo_id, checkpoint.revision, checkpoint.sub)


def local(checkpoint: Path | Uri) -> Path:
    """A directory with all of it, downloaded into the cache where it is not there yet. Raises HubError."""
    return checkpoint if isinstance(checkpoint, Path) else fetch(checkpoint)


def cached(uri: Uri) -> Path:
    """A repository's folder in the local cache; without a revision, of its main branch as it was last seen.

    Raises CheckpointError where it is not there, or not whole. Opens no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(uri.repo_id, revision=uri.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        remedy = f"run hf download {uri.repo_id}{_flag(uri)}, or give a directory with --base"
        raise CheckpointError("not in the local Hugging Face cache", uri, remedy) from None
    except HFValidationError as error:
        raise CheckpointError(str(error), uri) from None
    return folder / uri.sub if uri.sub else folder


def fetch(uri: Uri, only: Sequence[str] | None = None) -> Path:
    """The folder of a repository in the local cache, downloaded where it is not there yet; `only` names the files to
    have. A commit that is there whole is taken without asking the Hub. Raises HubError, CheckpointError."""
    from huggingface_hub import snapshot_download

    if offline() or uri.is_commit and only is None:
        with contextlib.suppress(CheckpointError) if not offline() else contextlib.nullcontext():
            return cached(uri)
    prefix = f"{uri.sub}/" if uri.sub else ""
    patterns = [_literal(prefix + name) for name in only] if only is not None else [f"{prefix}*"] if prefix else None
    with told(uri):
        folder = Path(snapshot_download(uri.repo_id, revision=uri.revision, allow_patterns=patterns))
    return folder / uri.sub if uri.sub else folder


def _literal(name: str) -> str:
    """A pattern that only this name matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def config_error() -> type[Exception]:
    """What huggingface_hub raises, under transformers, for a config.json whose values contradict each other."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError
