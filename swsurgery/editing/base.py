"""Find the base of a manifest, and the digests that the files of the base must have."""

from __future__ import annotations

import os
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import read_checkpoint
from swsurgery.checkpoint.record import find_record
from swsurgery.editing.plan import Plan
from swsurgery.errors import CheckpointError, Fault, PlanError
from swsurgery.hub import RemoteTree, Uri, parse_location
from swsurgery.hub.names import suggest_uri
from swsurgery.manifest.load import LoadedManifest
from swsurgery.storage.arguments import require_location
from swsurgery.storage.folder import Folder, SingleFile


def collect_known_digests(plan: Plan) -> dict[str, tuple[str, str]]:
    """Collect the digests that files of the base must have: file name -> (sha256, "the manifest" or "its record").

    Raises PlanError if the manifest and the base's own record contradict each other.
    """
    pins = {n: (digest, "the manifest") for n, digest in plan.loaded.manifest.base.sha256.items()}
    for name, record in plan.previous.record.files.items() if plan.previous else ():
        if record.sha256:
            wanted, who = pins.setdefault(name, (record.sha256, "its record"))
            if wanted != record.sha256:
                raise PlanError(
                    f"the base's record has sha256 {record.sha256}, but {who} has {wanted}",
                    f"{plan.checkpoint.root}/{name}",
                    "give the right base",
                )
    return pins


def find_base(loaded: LoadedManifest, base: str | Path | None) -> Path | Uri:
    """Return the location of the base: `base` if it is given, otherwise the base that the manifest names.

    Raises HubError for a malformed name, and CheckpointError if the manifest's path does not exist and looks like the
    name of a repository on the Hub.
    """
    if base is not None:
        return parse_location(require_location("base", base))
    said = loaded.manifest.base
    if said.repo_id is not None:
        return Uri(said.repo_id, said.revision, "")
    assert said.path is not None  # the schema requires either repo_id or path
    where = loaded.path.parent / said.path
    if not os.path.lexists(where):
        remedy = "base.path is relative to the folder of the manifest"
        if suggest_uri(said.path):
            remedy += "; for a repository on the Hub, use base.repo_id"
        first = loaded.parts[0] if loaded.parts else loaded
        line, column = first.find_position("base", "path")
        position = f"{first.path}:{line}:{column}"
        raise CheckpointError.of([Fault("base.path: no such checkpoint", str(where), remedy, position)])
    return where


def read_base(root: Folder | RemoteTree, loaded: LoadedManifest) -> Checkpoint:
    """Read the headers of an entered base, which may be a GGUF file. Raises the errors of `read_checkpoint`.

    Raises PlanError for one file of a patched checkpoint: its record says what is protected, and would not be read.
    """
    if isinstance(root, SingleFile):
        with Folder.at(root.path) as folder:
            patched = find_record(folder)
        if patched is not None and root.name in patched.record.files:
            what = "the file belongs to a patched checkpoint, whose record must be read too"
            raise PlanError(what, root, f"give the directory {root.path}")
    return read_checkpoint(root, loaded.manifest.base, gguf=True)
