"""The only room that knows huggingface_hub: where a repository's files lie on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from swsurgery.errors import CheckpointError

_HF_URL = re.compile(r"hf://([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(?:@([A-Za-z0-9._/-]+))?")


def parse_url(text: str) -> tuple[str, str | None]:
    """`hf://ORG/NAME[@REV]` -> (repo_id, revision). Raises CheckpointError."""
    match = _HF_URL.fullmatch(text)
    if not match:
        raise CheckpointError("not of the form hf://ORG/NAME[@REVISION]", text)
    return match[1], match[2]


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


def config_error() -> type[Exception]:
    """What huggingface_hub raises, under transformers, for a config.json whose values contradict each other."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError
