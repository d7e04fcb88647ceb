"""Prepare changes of regions for an edit in place, and write them under the journal.

`in_place.py` calls these functions for every edit. They import numpy only if regions are changed or protected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from swsurgery.checkpoint import edited_shard, journal
from swsurgery.checkpoint.record import Record
from swsurgery.editing.overlay import PatchedFile, Replacement, replace_shards
from swsurgery.editing.plan import Plan
from swsurgery.errors import CheckpointError, PlanError
from swsurgery.progress import Progress
from swsurgery.storage.folder import Folder
from swsurgery.storage.numbers import format_size
from swsurgery.storage.splice import Splice, group_by_file

if TYPE_CHECKING:
    from swsurgery.editing.changed_bytes import Changed
    from swsurgery.editing.undo_file import UndoWriter
    from swsurgery.rewriting.segments import RegionChange

MAX_UNDO = 32 << 20
"""Maximum size in bytes of the old values in the undo file of an edit in place. When the edit is reverted in place, the
journal contains the undo file, in memory too."""

Changes: TypeAlias = "Mapping[str, Sequence[RegionChange]]"
"""The changed and protected regions of each file."""


def measure_regions(plan: Plan, progress: Progress) -> Changes:
    """Return the changed and protected regions of each file, with measured functions."""
    if not plan.rewrites and not plan.protected_regions:
        return {}
    from swsurgery.editing.measure import measure_changes

    return measure_changes(plan.rewrites, plan.protected_regions, plan.checkpoint, plan.loaded, progress)


def make_changed(remedy: str, undo: UndoWriter | None = None) -> Changed:
    """Return the object that collects the changed bytes of regions."""
    from swsurgery.editing.changed_bytes import Changed

    return Changed(remedy, undo)


def make_collector(
    plan: Plan, changes: Changes, undo_name: str | None, undo_limit: int, opened: contextlib.ExitStack
) -> Changed | None:
    """Return the object that collects the changed bytes and the old values; None if the plan has no regions.

    Raises PlanError if the old values exceed the limit.
    """
    if not changes:
        return None
    if undo_name is None:
        return make_changed("apply with -o")
    from swsurgery.editing.undo_file import UndoWriter

    written = [change for group in changes.values() for change in group if change.op != "keep"]
    writer = opened.enter_context(UndoWriter(undo_name, written, min(undo_limit, MAX_UNDO), None))
    if not writer.fits:  # before the files are read
        raise _make_undo_error(plan, undo_limit)
    return make_changed("apply with -o", writer)


def render_undo(changed: Changed | None, plan: Plan, undo_limit: int) -> bytes | None:
    """Return the bytes of the undo file; None if the plan changes no region. Raises PlanError if it is too large."""
    if changed is None or changed.undo is None:
        return None
    raw = changed.undo.render()
    if raw is None:
        raise _make_undo_error(plan, undo_limit)
    return raw


def _make_undo_error(plan: Plan, undo_limit: int) -> PlanError:
    """Build the error for an edit in place that nothing could undo."""
    limit = format_size(min(undo_limit, MAX_UNDO))
    what = f"the old bytes of the changed regions exceed {limit}, so an edit in place could not be undone"
    return PlanError(what, plan.loaded.path, "apply with -o")


def apply_changed(
    folder: Folder,
    shards: dict[str, edited_shard.OpenShard],
    splices: tuple[Splice, ...],
    changed: Changed | None,
    undo_name: str | None,
    *,
    reverts: bool = False,
    mode: int,
) -> AbstractContextManager[dict[str, bytes | None]]:
    """Write the splices and the changed bytes of regions under the journal; see `journal.apply_splices`."""
    if changed is None:
        return journal.apply_splices(folder, shards, splices, undo_name=undo_name, reverts=reverts, mode=mode)
    # The places of a file with changed regions contain its splices too.
    places = {name: found for name, found in changed.places.items() if name in shards}
    alone = [splice for splice in splices if splice.file not in places]
    return journal.apply_splices(folder, shards, alone, places=places, undo_name=undo_name, reverts=reverts, mode=mode)


def show_base(plan: Plan, shards: dict[str, edited_shard.OpenShard], changed: Changed | None) -> Plan:
    """Return the plan with a base whose changed bytes are read as they were, for the check after the edit."""
    old = {
        name: PatchedFile(shards[name].file, [Replacement(splice.offset, splice.old) for splice in group])
        for name, group in group_by_file(plan.splices).items()
    }
    if changed is not None:  # the places of a file with changed regions contain its splices too
        from swsurgery.editing.changed_bytes import overlay_old

        places = changed.places.items()
        old |= {name: overlay_old(shards[name].file, group) for name, group in places if name in shards}
    return replace(plan, checkpoint=replace_shards(plan.checkpoint, old))


def refuse_unlike_regions(record: Record, changed: Changed | None, root: Path) -> None:
    """Raise CheckpointError if the undo file does not restore the recorded bytes of a region."""
    for number, entry in enumerate(record.changes):
        assert changed is not None  # a record with changes has places for them
        tally = changed.tallies[f"undo.{number}"]
        if (tally.base_sha256, tally.sha256) != (entry.sha256, entry.base_sha256):
            what = "reverting this region would not restore the base, because the record was changed"
            raise CheckpointError(what, f"{root}: {entry.region}")
