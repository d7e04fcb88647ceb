"""Find the protected scalars of a block, and report the index of a scalar.

Must not depend on what a function does with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swsurgery.rewriting.function import Source
from swsurgery.rewriting.scope import Piece

Indices = NDArray[np.int64]
NOTHING: Indices = np.empty(0, np.int64)
NOTHING.flags.writeable = False


@dataclass(frozen=True)
class KeptScalars:
    """The protected scalars, the shape and the origin of each source of an edit, by the name of the source."""

    indices: Mapping[str, Indices] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    origins: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_sources(cls, sources: Sequence[Source]) -> KeptScalars:
        """Collect the protected scalars of `sources`."""
        indices = {s.name: np.array(s.kept, np.int64) for s in sources if s.kept}
        return cls(indices, {s.name: s.shape for s in sources}, {s.name: s.origin for s in sources})

    def find(self, name: str, first: int, count: int) -> Indices:
        """Return the protected scalars among the `count` scalars from flat index `first`, relative to `first`."""
        indices = self.indices.get(name)
        if indices is None:
            return NOTHING
        begin, end = np.searchsorted(indices, [first, first + count])
        return indices[begin:end] - first

    def find_in_piece(self, name: str, row: int, columns: int, piece: Piece) -> Indices:
        """Return the protected scalars of a piece of a block, as flat indices in the piece.

        `row` is the row of the source at which the block begins, and `columns` is the number of its columns.
        """
        if name not in self.indices:
            return NOTHING
        rows = piece.end - piece.begin
        down, across = np.divmod(self.find(name, (row + piece.begin) * columns, rows * columns), columns)
        inside = (across >= piece.left) & (across < piece.right)
        return down[inside] * (piece.right - piece.left) + across[inside] - piece.left

    def format_index(self, name: str, flat: int) -> str:
        """Format the index in the tensor of a scalar, as in `[3, 17]`. `flat` is its flat index in its source."""
        shape = self.shapes.get(name)
        if not shape:
            return f"[{flat}]"
        begin = self.origins.get(name) or (0,) * len(shape)
        return str([int(i) + first for i, first in zip(np.unravel_index(flat, shape), begin, strict=True)])
