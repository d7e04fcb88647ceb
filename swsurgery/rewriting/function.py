"""Define what a function of a rewrite is: new bit patterns for the scalars of a region.

A bit pattern is the unsigned integer that a scalar's stored bits form: 0x40bc for 5.875 in BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swsurgery.storage.dtypes import Dtype

Words = NDArray[np.unsignedinteger]
"""An array of bit patterns, one per scalar, of the unsigned integer type with the width of the dtype."""

CHUNK_SCALARS = 65_536
"""Statistics are float64 sums over this many scalars, added in the order of the chunks, so that the result does not
depend on the size of the blocks that are read."""


@dataclass(frozen=True)
class Source:
    """One tensor from which statistics are taken.

    `read` yields the bit patterns in the stored order, in flat arrays of any length. `kept` are the flat indices of
    protected scalars, in rising order.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Words]]
    kept: tuple[int, ...] = ()


class Function(Protocol):
    """Compute new bit patterns, block by block.

    A block is a two-dimensional array (rows, columns): columns is the last axis of the region, and rows counts all
    other axes together.
    """

    @property
    def sparse(self) -> bool:
        """True if the function usually changes a small part of the scalars, as clipping does."""
        ...

    def find_height(self, shape: Sequence[int]) -> int:
        """Return the number of rows that must be in one block for a region of `shape`.

        1 if every row is independent of the others. Blocks begin at multiples of this number.
        """
        ...

    def measure(self, sources: Sequence[Source]) -> Function:
        """Return the function with the statistics of the tensors that an edit changes; itself if it needs none.

        Raises NumberError if the statistics make the operation impossible, such as a clip that removes everything.
        """
        ...

    def compute(self, name: str, dtype: Dtype, row: int, words: Words) -> Words:
        """Return the new bit patterns of a block (rows, columns) of tensor `name` whose first row is `row`.

        The caller restores protected scalars afterwards. Raises NumberError for a result that the dtype cannot
        represent.
        """
        ...
