"""Hash changed regions and count their changed scalars while a file is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swsurgery.rewriting.function import Words
from swsurgery.rewriting.segments import RegionChange, RegionPart
from swsurgery.rewriting.stream import Observe


@dataclass(frozen=True)
class Digests:
    """The sha256 of a region's bytes in C order, in the base and after the edit, and the number of changed scalars."""

    name: str
    base_sha256: str
    sha256: str
    changed: int


class _Sums:
    """The running digests of one region."""

    def __init__(self) -> None:
        self.old, self.new, self.changed = hashlib.sha256(), hashlib.sha256(), 0


class Tally:
    """Collects the digests of all regions of a file. `more` receives every part too."""

    def __init__(self, changes: Sequence[RegionChange], more: Observe | None = None):
        self._sums = {change.name: _Sums() for change in changes}
        self._more = more

    def observe(self, part: RegionPart, old: Words, new: Words) -> None:
        """Add a part of a region, which must follow the previous part of the same region."""
        sums = self._sums[part.change.name]
        sums.old.update(np.ascontiguousarray(old).data)
        if part.change.op != "keep":
            sums.new.update(np.ascontiguousarray(new).data)
            sums.changed += int(np.count_nonzero(old != new))
        if self._more and part.change.op != "keep":
            self._more(part, old, new)

    def finish(self) -> dict[str, Digests]:
        """Return the digests of each region by its name. A region that is only hashed has the same digest twice."""
        return {
            name: Digests(
                name, sums.old.hexdigest(), (sums.new if sums.changed else sums.old).hexdigest(), sums.changed
            )
            for name, sums in self._sums.items()
        }
