"""Compare a base with the digests that the manifest, a patch or the base's own registry says it must have.

A copy compares every file while it reads it (`apply.py`). This module is for files that are not copied: those of a dry
run, and pinned files that an edit leaves out or replaces. Every digest is computed here or listed by the Hub.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from swsurgery.editing.base import known_digests
from swsurgery.editing.plan import Plan
from swsurgery.progress import Progress
from swsurgery.storage.hashing import hashed, hold_to


def check_planned(plan: Plan, progress: Progress) -> Plan:
    """Compare what a dry run can, and return the plan with the names of the files compared and not compared.

    If the base is a directory, the shards that the edits touch are hashed. If it is on the Hub, the digests that the
    Hub lists are compared. Raises PlanError if a digest differs from its pin.
    """
    pins = known_digests(plan)
    touched = {splice.file for splice in plan.splices}
    checked: list[str] = []
    for file in plan.checkpoint.files:
        if file.name not in pins:
            continue
        here = file.is_here
        digest = file.digest if not here else hashed(file, progress) if file.name in touched else None
        if digest is not None:
            hold_to(file, digest, pins)
            checked.append(file.name)
    unchecked = sorted(set(pins) - set(checked))
    return replace(plan, pins_checked=tuple(sorted(checked)), pins_unchecked=tuple(unchecked))


def check_left_out(plan: Plan, written: Collection[str], pins: dict[str, tuple[str, str]], progress: Progress) -> None:
    """Hash the files that the manifest pins and that are not among the files `written`. Raises PlanError."""
    for name in sorted(set(plan.loaded.manifest.base.sha256) - set(written)):
        file = plan.checkpoint.file(name)
        digest = hashed(file, progress) if file.is_here else file.digest
        if digest is not None:
            hold_to(file, digest, pins)
