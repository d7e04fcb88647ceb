"""The only rooms that know huggingface_hub.

    __init__.py   names of repositories, and their files on this machine
    remote.py     files of a repository read by ranges
    faults.py     what the library raises -> one line of ours

Cache, offline mode, tokens and mirrors are the library's own, with its environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swsurgery.errors import CheckpointError, HubError
from swsurgery.hub.faults import told
from swsurgery.hub.remote import RemoteFile, Repo, Traffic, open_repo

__all__ = ["RemoteFile", "Repo", "Traffic", "Uri", "cached_snapshot", "config_error", "fetch", "is_uri", "offline",
           "open_repo", "open_uri", "parse_uri"]  # fmt: skip

SCHEME = "hf://"


@dataclass(frozen=True)
class Uri:
    """hf://ORG/NAME[@REVISION][/sub]"""

    repo_id: str
    revision: str | None
    sub: str

    def __str__(self) -> str:
        return SCHEME + self.repo_id + (f"@{self.revision}" if self.revision else "") + (
            f"/{self.sub}" if self.sub else "")  # fmt: skip


def is_uri(text: str) -> bool:
    return text.startswith(SCHEME)


def parse_uri(text: str) -> Uri:
    """`hf://ORG/NAME[@REVISION][/sub]` of a model. Raises HubError."""
    from huggingface_hub.utils import parse_hf_uri

    with told(text):
        uri = parse_hf_uri(text)
    if uri.type != "model":
        raise HubError(f"a {uri.type}, not a model", text)
    return Uri(uri.id, uri.revision, uri.path_in_repo.strip("/"))


def parse_url(text: str) -> tuple[str, str | None]:
    """`hf://ORG/NAME[@REV]` -> (repo_id, revision). Raises HubError."""
    uri = parse_uri(text)
    return uri.repo_id, uri.revision


def offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def open_uri(uri: Uri) -> Repo:
    """Raises HubError."""
    return open_repo(uri.repo_id, uri.revision, uri.sub)


def cached_snapshot(repo_id: str, revision: str | None) -> Path:
    """The snapshot folder of a repository in the local cache; without `revision` the one of its main branch.

    Raises CheckpointError where it was not downloaded. Opens no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    at = f"@{revision}" if revision else ""
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        flag = f" --revision {revision}" if revision else ""
        remedy = f"run hf download {repo_id}{flag}, or give a directory with --base"
        raise CheckpointError("not in the local Hugging Face cache", f"hf://{repo_id}{at}", remedy) from None
    except HFValidationError as error:
        raise CheckpointError(str(error), f"hf://{repo_id}{at}") from None


def fetch(uri: Uri, only: Sequence[str] | None = None) -> Path:
    """The folder of a repository in the local cache, downloaded where it is not there yet; `only` names the files to
    have. A commit that is there whole is taken without asking the Hub. Raises HubError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    prefix = f"{uri.sub}/" if uri.sub else ""
    patterns = [_literal(prefix + name) for name in only] if only is not None else [f"{prefix}*"] if prefix else None
    with told(uri):
        try:
            folder = snapshot_download(uri.repo_id, revision=uri.revision, allow_patterns=patterns,
                                       local_files_only=offline())  # fmt: skip
        except LocalEntryNotFoundError:
            if offline():
                raise CheckpointError("not in the local Hugging Face cache, and the offline mode is on", uri,
                                      "unset HF_HUB_OFFLINE") from None  # fmt: skip
            raise
    return Path(os.path.join(folder, uri.sub)) if uri.sub else Path(folder)


def _literal(name: str) -> str:
    """A pattern that only this name matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def config_error() -> type[Exception]:
    """What huggingface_hub raises, under transformers, for a config.json whose values contradict each other."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError
