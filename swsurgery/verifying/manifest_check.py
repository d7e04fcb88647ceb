"""Check a checkpoint against a manifest: its own, or one that the user gives.

The modules that read manifests and plan edits are imported only if there is a manifest to check.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import MANIFEST_NAME, Patched
from swsurgery.errors import ManifestError
from swsurgery.hub import RemoteTree
from swsurgery.progress import Progress
from swsurgery.storage.folder import Folder
from swsurgery.verifying.findings import Finding

if TYPE_CHECKING:
    from swsurgery.manifest.load import LoadedManifest
    from swsurgery.verifying.against_manifest import Wishes


def resolve_wishes(
    loaded: LoadedManifest | None, checkpoint: Checkpoint, repo_ids: tuple[str | None, ...]
) -> Wishes | None:
    """Resolve the edits of a manifest in a checkpoint. Returns None if there is no manifest."""
    if loaded is None:
        return None
    from swsurgery.verifying.against_manifest import read_wishes

    return read_wishes(loaded, checkpoint, repo_ids)


def resolve_own_manifest(
    root: Folder | RemoteTree, patched: Patched, checkpoint: Checkpoint, repo_ids: tuple[str | None, ...]
) -> Wishes | None:
    """Resolve the manifest in the checkpoint, so that findings can name its lines. Returns None if it is invalid."""
    from swsurgery.manifest.load import parse_manifest

    try:
        beside = Path() if isinstance(root, RemoteTree) else root.path
        loaded = parse_manifest(patched.manifest_raw, beside / MANIFEST_NAME)
    except ManifestError:
        return None  # the manifest was changed by hand, which its digest already reports
    return resolve_wishes(loaded, checkpoint, repo_ids)


def check_manifest(
    wishes: Wishes, patched: Patched | None, checkpoint: Checkpoint, base: Checkpoint | None, progress: Progress
) -> list[Finding]:
    """Compare a checkpoint with a manifest, by its record and by the base, as far as they are given."""
    from swsurgery.verifying.against_manifest import check_by_record

    findings = check_by_record(wishes, patched.record) if patched else []
    if base is None:
        return findings
    from swsurgery.verifying.against_base import check_by_base, plan_against_record, plan_or_report

    plan, misfits = plan_or_report(wishes.loaded, base)
    if plan is None:
        said = {(f.line, f.message) for f in findings}
        return findings + [f for f in misfits if (f.line, f.message) not in said]
    if patched:
        return findings + plan_against_record(wishes, plan, patched.record)
    return check_by_base(wishes, plan, checkpoint, progress)
