"""Hash changed regions and count their changed scalars while a file is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swsurgery.rewriting.scope import PIECE_SCALARS
from swsurgery.rewriting.segments import RegionChange, RegionPart
from swsurgery.rewriting.stream import Observe
from swsurgery.storage.arrays import Words

DIGESTED_SIZE = 1 << 20
"""Maximum size in bytes of a changed region that has digests of its own. A larger region is proved by the digests of
its file alone, because hashing its bytes twice more would take as long as the rest of the edit."""


@dataclass(frozen=True)
class Digests:
    """The sha256 of a region's bytes in C order, in the base and after the edit, and the number of changed scalars.

    Both digests are None for a region that is too large to have digests of its own.
    """

    name: str
    base_sha256: str | None
    sha256: str | None
    changed: int


def has_digests(change: RegionChange) -> bool:
    """Return True if a region gets digests of its own: small, protected and restored regions do by default."""
    if change.digested is not None:
        return change.digested
    size = change.region.scalars * change.info.dtype.size
    return size <= DIGESTED_SIZE or change.op in ("keep", "restore")


class _Sums:
    """The running digests of one region, and the number of its changed scalars."""

    def __init__(self, hashed: bool) -> None:
        self.old, self.new = hashlib.sha256(), hashlib.sha256()
        self.hashed, self.changed = hashed, 0

    def finish(self, name: str) -> Digests:
        """Return the digests. A region that is only hashed, or not changed, has the same digest twice."""
        if not self.hashed:
            return Digests(name, None, None, self.changed)
        return Digests(name, self.old.hexdigest(), (self.new if self.changed else self.old).hexdigest(), self.changed)


class Tally:
    """Collects the digests of all regions of a file. `more` receives every part too."""

    def __init__(self, changes: Sequence[RegionChange], more: Observe | None = None):
        self._sums = {change.name: _Sums(has_digests(change)) for change in changes}
        self._more = more

    def observe(self, part: RegionPart, old: Words, new: Words) -> None:
        """Add a part of a region, which must follow the previous part of the same region."""
        sums = self._sums[part.change.name]
        if sums.hashed:
            sums.old.update(np.ascontiguousarray(old).data)
        if part.change.op != "keep":
            if sums.hashed:
                sums.new.update(np.ascontiguousarray(new).data)
            sums.changed += count_different(old, new)
        if self._more and part.change.op != "keep":
            self._more(part, old, new)

    def finish(self) -> dict[str, Digests]:
        """Return the digests of each region by its name."""
        return {name: sums.finish(name) for name, sums in self._sums.items()}


def count_different(old: Words, new: Words) -> int:
    """Count the places at which two arrays (rows, columns) differ, in pieces that fit the processor's cache."""
    count = 0
    step = max(1, PIECE_SCALARS // max(1, old.shape[1]))
    for row in range(0, len(old), step):
        count += int(np.count_nonzero(old[row : row + step] != new[row : row + step]))
    return count
