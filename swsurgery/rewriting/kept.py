"""Find the protected scalars of a block, and report the index of a scalar.

Must not depend on what a function does with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swsurgery.rewriting.function import Source

Indices = NDArray[np.int64]
NOTHING: Indices = np.empty(0, np.int64)
NOTHING.flags.writeable = False


@dataclass(frozen=True)
class Kept:
    """The protected scalars and the shape of each source of an edit, by the name of the source."""

    indices: Mapping[str, Indices] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_sources(cls, sources: Sequence[Source]) -> Kept:
        """Collect the protected scalars of `sources`."""
        indices = {s.name: np.array(s.kept, np.int64) for s in sources if s.kept}
        return cls(indices, {s.name: s.shape for s in sources})

    def find(self, name: str, first: int, count: int) -> Indices:
        """Return the protected scalars among the `count` scalars from flat index `first`, relative to `first`."""
        indices = self.indices.get(name)
        if indices is None:
            return NOTHING
        begin, end = np.searchsorted(indices, [first, first + count])
        return indices[begin:end] - first

    def format_index(self, name: str, flat: int) -> str:
        """Format the index of a scalar in its source, as in `[3, 17]`."""
        shape = self.shapes.get(name)
        return str([int(i) for i in np.unravel_index(flat, shape)]) if shape else f"[{flat}]"
