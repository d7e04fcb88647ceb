"""Divide a region into groups of scalars that share a statistic: the tensor, channels (rows) or blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

PIECE_SCALARS = 131_072
"""Blocks are computed in pieces of about this many scalars, so that the buffers stay in the processor's cache.

Smaller pieces are slower: each one needs about 20 microseconds beside the time for its scalars."""


Scalar = TypeVar("Scalar", bound=np.generic)


class Tile(NamedTuple):
    """A part of a matrix that consists of whole groups of `height` rows and `width` columns."""

    rows: slice
    columns: slice
    height: int
    width: int

    def view(self, matrix: NDArray[Scalar]) -> NDArray[Scalar]:
        """Return the tile of `matrix` as a view (groups down, height, groups across, width)."""
        part = matrix[self.rows, self.columns]
        return part.reshape(-1, self.height, part.shape[1] // self.width, self.width)


def gather(tile: Tile, matrix: NDArray[Scalar]) -> NDArray[Scalar]:
    """Return a copy of the groups of a tile, one per row."""
    view = tile.view(matrix).transpose(0, 2, 1, 3)
    return np.array(view, order="C").reshape(-1, tile.height * tile.width)


def scatter(tile: Tile, groups: NDArray[Scalar], out: NDArray[Scalar]) -> None:
    """Write groups, one per row, to a tile of `out`."""
    view = tile.view(out)
    down, height, across, width = view.shape
    view[...] = groups.reshape(down, across, height, width).transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class Grouping:
    """The size of a group. `columns` is None for whole rows, and both are None for the whole tensor."""

    rows: int | None = None
    columns: int | None = None

    @property
    def is_tensor(self) -> bool:
        """True if all scalars of a tensor share one statistic."""
        return self.rows is None

    @property
    def height(self) -> int:
        """The number of rows that must be in one block."""
        return self.rows or 1

    def find_tiles(self, rows: int, columns: int) -> Iterator[Tile]:
        """Yield tiles that cover a matrix. The last groups of a row and of a column may be smaller than the others."""
        if not rows or not columns:
            return
        for begin, end, height in _divide(rows, self.height):
            for left, right, width in _divide(columns, self.columns or columns):
                yield Tile(slice(begin, end), slice(left, right), height, width)


class Piece(NamedTuple):
    """A part of a matrix: rows `begin` to `end`, and columns `left` to `right`."""

    begin: int
    end: int
    left: int
    right: int

    @property
    def scalars(self) -> int:
        """The number of scalars in the part."""
        return (self.end - self.begin) * (self.right - self.left)

    def view(self, matrix: NDArray[Scalar]) -> NDArray[Scalar]:
        """Return the part of `matrix` as a view."""
        return matrix[self.begin : self.end, self.left : self.right]


def find_pieces(rows: int, columns: int, height: int, width: int | None) -> Iterator[Piece]:
    """Yield pieces of about PIECE_SCALARS scalars that cover a matrix, in rising order.

    Their sides are multiples of `height` and `width` (None: all columns), except at the end of the matrix.
    """
    width = width or max(columns, 1)
    down = max(PIECE_SCALARS // max(columns, 1) // height, 1) * height
    across = max(PIECE_SCALARS // down // width, 1) * width
    for begin in range(0, rows, down):
        for left in range(0, columns, across):
            yield Piece(begin, min(begin + down, rows), left, min(left + across, columns))


TENSOR = Grouping()
CHANNEL = Grouping(1)


def read_scope(per: object, block: object) -> Grouping:
    """Read the options `per` ("tensor" or "channel") and `block` (n or [rows, columns]); None if one is absent.

    Raises ValueError for other values, and if both are given.
    """
    if block is None:
        if per not in (None, "tensor", "channel"):
            raise ValueError(f"per is {per!r}: give tensor or channel")
        return CHANNEL if per == "channel" else TENSOR
    if per is not None:
        raise ValueError("has both per and block: give one of them")
    sides = block if isinstance(block, list | tuple) else (1, block)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"block is {block!r}: give a positive whole number or [rows, columns]")
    return Grouping(*sides)


def _divide(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, size of a group): first all whole groups, then the rest as one smaller group."""
    whole = length // size * size
    if whole:
        yield 0, whole, size
    if whole < length:
        yield whole, length, length - whole
