"""Find the edits of merged manifests that repeat a change of another manifest, and leave them out.

Two edits repeat each other if they store the same bits in the same scalars, or do the same to the same regions. All
other edits of one scalar are conflicts, which the planner reports.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing.asked import Asked
from swsurgery.editing.plan_scalars import plan_elements, read_scalars
from swsurgery.editing.resolve import Resolution, resolve
from swsurgery.editing.sources import Sources
from swsurgery.editing.targets import FindKnown
from swsurgery.errors import Fault
from swsurgery.manifest.load import LoadedManifest, Origin
from swsurgery.manifest.merge import select_edits
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.region import Region
from swsurgery.storage.splice import Splice


@dataclass(frozen=True)
class _Part:
    """One of the merged manifests: what its edits name, and what they do to each scalar (as bits or a code)."""

    loaded: LoadedManifest
    resolution: Resolution
    outcomes: dict[Coordinate, Hashable]

    def list_units(self) -> Iterator[tuple[int, Coordinate | Region, Hashable]]:
        """Yield (number of the edit, scalar or region, what is done to it or None if this is unknown)."""
        for one in self.resolution.asked:
            yield one.number, one.coordinate, self.outcomes.get(one.coordinate)
        for region in self.resolution.regions:
            edit = region.edit
            yield region.number, region.region, (edit.op, json.dumps(edit.options, sort_keys=True))


def drop_repeated(
    loaded: LoadedManifest, checkpoint: Checkpoint, find_known: FindKnown
) -> tuple[LoadedManifest, list[str]]:
    """Leave out each edit of merged manifests that only repeats what earlier manifests do.

    Also returns the conflicts that a plan of the merged edits does not report, because `known: all` leaves out the
    scalars that other edits name. Across manifests, two different operations on such a scalar are a conflict.
    """
    parts = [_read_part(part, checkpoint, find_known) for part in loaded.parts]
    first: dict[Coordinate | Region, tuple[int, Hashable]] = {}
    repeated: set[Origin] = set()
    for at, part in enumerate(parts):
        fresh: set[int] = set()
        seen: set[int] = set()
        for number, unit, outcome in part.list_units():
            earlier, done = first.setdefault(unit, (at, outcome))
            seen.add(number)
            if earlier == at or outcome is None or done != outcome:
                fresh.add(number)
        repeated |= {Origin(at, number) for number in seen - fresh}
    kept = [origin for origin in loaded.origins if origin not in repeated]
    faults = [fault for at in range(len(parts)) for fault in _list_hidden(parts, at)]
    return (select_edits(loaded, kept) if repeated else loaded), faults


def _read_part(part: LoadedManifest, checkpoint: Checkpoint, find_known: FindKnown) -> _Part:
    """Find what the edits of one manifest do to each scalar that can be edited."""
    resolution = resolve(part.manifest, checkpoint, find_known)
    sources = Sources(part.path.parent)
    plain, codes = plan_elements(resolution.asked, checkpoint, sources)
    read, _ = read_scalars(plain, checkpoint, sources)
    outcomes: dict[Coordinate, Hashable] = {
        one.coordinate: scalar.new if isinstance(scalar, Splice) else "protect" for one, scalar in read
    }
    outcomes |= {edit.coordinate: edit.op if edit.op == "protect" else edit.new_code for edit in codes.edits}
    return _Part(part, resolution, outcomes)


def _list_hidden(parts: list[_Part], at: int) -> Iterator[str]:
    """List the scalars that `known: all` of one manifest changes, and that another manifest changes in another way."""
    mine = parts[at]
    for one in mine.resolution.asked:
        if one.edit.known != "all" or not one.edit.writes:
            continue
        for other in parts[:at] + parts[at + 1 :]:
            number = _find_other(one, mine, other)
            if number is not None:
                what = f"{one.coordinate} has two operations (the other is {other.loaded.describe_position(number)})"
                yield Fault(what, position=mine.loaded.describe_position(one.number))


def _find_other(one: Asked, mine: _Part, other: _Part) -> int | None:
    """Return the number of an edit in `other` that does something else to a scalar; None if there is none."""
    for theirs in other.resolution.asked:
        if theirs.coordinate == one.coordinate and theirs.edit.known != "all":
            same = mine.outcomes.get(one.coordinate) == other.outcomes.get(one.coordinate)
            return None if same else theirs.number
    inside = (r.number for r in other.resolution.regions if r.region.contains(one.coordinate))
    return next(inside, None)
