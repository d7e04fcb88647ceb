"""Find the bytes that an edit of regions changes in a file, so that a journal can contain them.

The file is read once and nothing is written. The memory for the result is bounded by MAX_CHANGED and MAX_PLACES.
"""

from __future__ import annotations

import bisect
import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from swsurgery.checkpoint.journal_format import JournalPlace
from swsurgery.editing.overlay import PatchedFile, Replacement
from swsurgery.editing.undo_file import UndoWriter
from swsurgery.errors import PlanError
from swsurgery.progress import Progress
from swsurgery.storage.files import BaseFile, LocalFile
from swsurgery.storage.numbers import format_size
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.shard import Shard
from swsurgery.storage.splice import Splice

load_numpy()

import numpy as np  # noqa: E402

from swsurgery.rewriting.segments import RegionChange, Segment, list_segments  # noqa: E402
from swsurgery.rewriting.stream import Receivers, stream_changed  # noqa: E402
from swsurgery.rewriting.tally import Digests, Tally  # noqa: E402

MAX_CHANGED = 16 << 20
"""Maximum number of bytes that one edit of regions changes in place. The journal contains the old and the new ones, and
up to three copies of it are in memory: the places, the bytes that are written, and the places that are parsed to prove
that recovery can read them. The edit of 16 MB and its reversion then need 250 MiB of memory, with the undo file."""

MAX_PLACES = 1 << 17
"""Maximum number of runs of changed bytes. The journal's JSON line has two commas for each, and may have 524,288."""

MAX_GAP = 16
"""Unchanged bytes between two changed ones belong to their run if there are at most so many. A further run needs about
as many bytes in the journal, and two more reads and writes."""

BLOCK = 1 << 20
"""Number of bytes that are compared at a time."""


@dataclass
class Changed:
    """What one edit changes in all its files.

    `places` contains the changed runs of each file, and `tallies` the digests of each region. `remedy` tells the user
    what to do if the limits are exceeded.
    """

    remedy: str
    undo: UndoWriter | None = None
    places: dict[str, list[JournalPlace]] = field(default_factory=dict)
    tallies: dict[str, Digests] = field(default_factory=dict)
    size: int = 0
    count: int = 0

    def read(
        self,
        opened: LocalFile,
        file: BaseFile,
        splices: Sequence[Splice],
        changes: Sequence[RegionChange],
        progress: Progress,
        header: Shard | None,
    ) -> tuple[str, str]:
        """Read a file once, and return its sha256 before and after the edit. `splices` are sorted by offset.

        Raises PlanError if the edit changes too many bytes, and the errors of `stream_changed`.
        """
        segments = list_segments(changes)
        places = [JournalPlace(s.offset, s.old, s.new) for s in _list_outside(splices, segments)]

        def compare(offset: int, old: memoryview, new: memoryview) -> None:
            self._compare(offset, old, new, places, file)

        with contextlib.ExitStack() as spooled:
            spool = spooled.enter_context(self.undo.open_spool()) if self.undo else None
            tally = Tally(changes, spool.add if spool else None)
            receivers = Receivers(observe=tally.observe, compare=compare)
            digests = stream_changed(opened, file, splices, segments, progress.advance, receivers, header)
            if spool:
                spool.keep()
        self.places[file.name] = sorted(places, key=operator.attrgetter("offset"))
        self.tallies |= tally.finish()
        return digests

    def _compare(
        self, offset: int, old: memoryview, new: memoryview, places: list[JournalPlace], file: BaseFile
    ) -> None:
        """Add the runs in which the bytes `old` and `new` at `offset` of a file differ."""
        before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
        for at in range(0, len(old), BLOCK):
            changed = np.flatnonzero(before[at : at + BLOCK] != after[at : at + BLOCK])
            if not len(changed):
                continue
            cuts = np.flatnonzero(np.diff(changed) > MAX_GAP + 1)
            first, last = changed[np.r_[0, cuts + 1]] + at, changed[np.r_[cuts, len(changed) - 1]] + at
            self.size += int((last - first + 1).sum())
            self.count += len(first)
            if self.size > MAX_CHANGED or self.count > MAX_PLACES:
                most = format_size(MAX_CHANGED) if self.size > MAX_CHANGED else f"{MAX_PLACES} separate runs of bytes"
                raise PlanError(f"the edit changes more than {most}, too many to do in place", file.source, self.remedy)
            for begin, end in zip(first.tolist(), (last + 1).tolist(), strict=True):
                places.append(JournalPlace(offset + begin, bytes(old[begin:end]), bytes(new[begin:end])))


def _list_outside(splices: Sequence[Splice], segments: Sequence[Segment]) -> list[Splice]:
    """Return the splices that are in no segment. Those in a segment are among its changed bytes."""
    offsets = [segment.offset for segment in segments]
    outside = []
    for splice in splices:
        at = bisect.bisect_right(offsets, splice.offset) - 1
        if at < 0 or segments[at].offset + segments[at].size <= splice.offset:
            outside.append(splice)
    return outside


def hash_regions(
    opened: LocalFile,
    file: BaseFile,
    splices: Sequence[Splice],
    changes: Sequence[RegionChange],
    progress: Progress,
) -> tuple[tuple[str, str], dict[str, Digests]]:
    """Read a file once; return its sha256 before and after the changes, and the digests of each region by its name."""
    tally = Tally(changes)
    receivers = Receivers(observe=tally.observe)
    digests = stream_changed(opened, file, splices, list_segments(changes), progress.advance, receivers)
    return digests, tally.finish()


def overlay_old(file: LocalFile, places: Sequence[JournalPlace]) -> PatchedFile:
    """Return a file whose changed places are read as they were before the edit."""
    return PatchedFile(file, [Replacement(place.offset, place.old) for place in places])
