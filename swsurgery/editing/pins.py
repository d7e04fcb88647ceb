"""Compare the digests of a base's files with their pins, for files that are not copied.

A pin is the sha256 that the manifest, a patch or the base's own record requires of a file. `copy.py` compares every
file that it copies. This module compares the files of a dry run, and the pinned files that an edit leaves out or
replaces. Every digest is computed from the file or listed by the Hub.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from swsurgery.editing.base import collect_known_digests
from swsurgery.editing.plan import Plan
from swsurgery.progress import Progress
from swsurgery.storage.hashing import check_digest, hash_file


def check_planned(plan: Plan, progress: Progress) -> Plan:
    """Compare digests with pins for a dry run, and return the plan with its `pins_checked` and `pins_unchecked` set.

    If the base is a directory, only the pinned shards with edits are hashed and compared. If the base is on the Hub,
    the digests that the Hub lists are compared. Raises PlanError if a digest differs from its pin.
    """
    pins = collect_known_digests(plan)
    touched = plan.touched
    checked: list[str] = []
    for file in plan.checkpoint.files:
        if file.name not in pins:
            continue
        digest = file.digest
        if file.is_here:
            digest = hash_file(file.source, progress) if file.name in touched else None
        if digest is not None:
            check_digest(file, digest, pins)
            checked.append(file.name)
    unchecked = sorted(set(pins) - set(checked))
    return replace(plan, pins_checked=tuple(sorted(checked)), pins_unchecked=tuple(unchecked))


def check_left_out(plan: Plan, written: Collection[str], pins: dict[str, tuple[str, str]], progress: Progress) -> None:
    """Compare the digest of each file that the manifest pins and that is not in `written` with its pin.

    A file on the Hub without a listed digest is skipped. Raises PlanError if a digest differs.
    """
    for name in sorted(set(plan.loaded.manifest.base.sha256) - set(written)):
        file = plan.checkpoint.get_file(name)
        digest = hash_file(file.source, progress) if file.is_here else file.digest
        if digest is not None:
            check_digest(file, digest, pins)
