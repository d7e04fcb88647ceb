"""Read any checkpoint, patched or not, together with its record.

Must not depend on the formats of exports.
"""

from __future__ import annotations

from dataclasses import dataclass

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import read_checkpoint
from swsurgery.checkpoint.record import Patched, find_record
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.hub import RemoteTree
from swsurgery.known import KnownModel, own
from swsurgery.storage.folder import Folder


@dataclass(frozen=True)
class _Choice:
    """The weights to read of a checkpoint without a record: its only weights."""

    weights: Weights | None = None
    variant: str | None = None


def read_with_record(root: Folder | RemoteTree) -> tuple[Checkpoint, Patched | None]:
    """Read an open checkpoint and its record, which is None if there is none. Raises CheckpointError."""
    patched = find_record(root)
    if patched is None:
        return read_checkpoint(root, _Choice()), None
    return read_checkpoint(root, patched.record.base, elsewhere=patched.record.elsewhere), patched


def identify_model(checkpoint: Checkpoint, patched: Patched | None, name: str | None) -> KnownModel | None:
    """Return the known model called `name` or, if it is None, the one that the checkpoint's files name.

    Returns None if the files name no known model. Raises LookupFailed if `name` is not known.
    """
    facts = (patched.record.known or {}) if patched else {}
    base = patched.record.base.repo_id if patched else None
    return own.identify(name, (base, facts.get("hf_id"), checkpoint.repo_id, checkpoint.config.get("_name_or_path")))
