"""Define what a function of a rewrite is: new bit patterns for the scalars of a region.

A bit pattern is the unsigned integer that a scalar's stored bits form: 0x40bc for 5.875 in BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from swsurgery.storage.arrays import Words
from swsurgery.storage.dtypes import Dtype

CHUNK_SCALARS = 65_536
"""Statistics are float64 sums over this many scalars, added in the order of the chunks, so that the result does not
depend on the size of the blocks that are read."""


@dataclass(frozen=True)
class Source:
    """One region of a stored tensor, from which statistics are taken.

    `name` identifies the region within an edit: an edit that changes two regions of one tensor uses two names. `shape`
    is the shape of the region. `read` yields its bit patterns in C order, in flat arrays of any length that may share
    one buffer. `kept` are the flat indices in the region of protected scalars, in rising order. `origin` is the index
    of the region's first scalar in the tensor, for messages; () for a whole tensor.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Words]]
    kept: tuple[int, ...] = ()
    origin: tuple[int, ...] = ()


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

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the new bit patterns of a block (rows, columns) of the source `name` whose first row is `row`.

        `words` is C-contiguous. The result is written to `out` if it is given, which may be `words` itself. The caller
        restores protected scalars afterwards, since they may have any value in the result. Several threads may compute
        blocks at the same time. Raises NumberError for a result that the dtype cannot represent.
        """
        ...


class ScalarwiseFunction:
    """A function that needs no other scalar to compute one, and usually changes all of them."""

    @property
    def sparse(self) -> bool:
        """False: most scalars may change."""
        return False

    def find_height(self, shape: Sequence[int]) -> int:
        """Return 1, because rows are independent."""
        return 1
