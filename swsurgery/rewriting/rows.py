"""Map a region of a stored tensor to rows of a matrix, and read these rows from a file.

A tensor is a matrix whose columns are its last axis; its rows count all other axes together. A region consists of some
of the rows, and of one range of columns.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from swsurgery.storage.arrays import Words, get_word_type
from swsurgery.storage.files import File, fill
from swsurgery.storage.region import Region, list_runs
from swsurgery.storage.shard import TensorInfo

BAND_SIZE = 4 << 20
"""Number of bytes of a tensor that are read and computed at a time, if the operation permits."""

Indices = NDArray[np.int64]

Runs = tuple[tuple[int, int], ...]
"""Runs of adjacent rows of a matrix, each as (first row, number of rows), in rising order."""


@dataclass(frozen=True)
class StoredMatrix:
    """A tensor as a matrix in a file.

    `start` is the offset of the data in bytes. If `flat` is True, a one-dimensional tensor is a matrix with one column,
    so that a long one can be divided; otherwise it is a matrix with one row.
    """

    info: TensorInfo
    start: int
    flat: bool = False

    @property
    def columns(self) -> int:
        """The number of columns."""
        shape = self.info.shape
        return 1 if self.flat or not shape else shape[-1]

    @property
    def rows(self) -> int:
        """The number of rows."""
        shape = self.info.shape
        return math.prod(shape) if self.flat else math.prod(shape[:-1])

    @property
    def row_size(self) -> int:
        """The size of a row in bytes."""
        return self.columns * self.info.dtype.size

    @cached_property
    def word_type(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer type of one bit pattern."""
        return get_word_type(self.info.dtype)

    def view(self, data: bytearray | memoryview) -> Words:
        """Return whole rows of the tensor, given as bytes, as an array (rows, columns) in the same memory."""
        words: Words = np.frombuffer(data, self.word_type).reshape(-1, self.columns)
        return words


@dataclass(frozen=True)
class RegionRows:
    """The rows and columns of a matrix that form a region."""

    matrix: StoredMatrix
    region: Region

    @cached_property
    def runs(self) -> Runs:
        """The rows of the region, as runs of adjacent rows of the matrix."""
        if self.matrix.flat:
            [(begin, end)] = self.region.bounds
            return ((begin, end - begin),)
        bounds, shape = self.region.bounds[:-1], self.matrix.info.shape[:-1]
        return tuple(list_runs(Region(self.region.tensor, bounds), shape))

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of the region's rows before each run, and their number in total."""
        return list(itertools.accumulate((count for _, count in self.runs), initial=0))

    @property
    def total(self) -> int:
        """The number of rows of the region."""
        total: int = self._firsts[-1]
        return total

    @property
    def columns(self) -> slice:
        """The columns of the region."""
        if self.matrix.flat or not self.region.bounds:
            return slice(0, 1)
        return slice(*self.region.bounds[-1])

    @property
    def width(self) -> int:
        """The number of columns of the region."""
        width: int = self.columns.stop - self.columns.start
        return width

    def count_before(self, row: int) -> int:
        """Return the number of rows of the region before a row of the matrix."""
        at = bisect.bisect_right(self.runs, (row, -1)) - 1
        if at < 0:
            return 0
        first, count = self.runs[at]
        before: int = self._firsts[at] + min(row - first, count)
        return before

    def select(self, begin: int, end: int) -> Runs:
        """Return rows `begin` to before `end` of the region as runs of rows of the matrix."""
        chosen = []
        at = bisect.bisect_right(self._firsts, begin) - 1
        while begin < end:
            first, count = self.runs[at]
            skip = begin - self._firsts[at]
            length = min(count - skip, end - begin)
            chosen.append((first + skip, length))
            begin, at = begin + length, at + 1
        return tuple(chosen)

    def take(self, words: Words, first: int, runs: Runs) -> Words:
        """Return the rows in `runs` and the region's columns of `words`, whose first row is row `first` of the matrix.

        The result is a view if `runs` is one run.
        """
        parts = [words[row - first : row - first + count, self.columns] for row, count in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def put(self, words: Words, first: int, runs: Runs, new: Words) -> None:
        """Store rows that `take` returned."""
        at = 0
        for row, count in runs:
            words[row - first : row - first + count, self.columns] = new[at : at + count]
            at += count

    def read(self, file: File, begin: int, end: int) -> Words:
        """Read the region's rows `begin` to before `end` from a file, as an array (rows, columns) of bit patterns."""
        parts = []
        for row, count in self.select(begin, end):
            buffer = bytearray(count * self.matrix.row_size)
            fill(file, buffer, self.matrix.start + row * self.matrix.row_size)
            parts.append(self.matrix.view(buffer)[:, self.columns])
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def read_all(self, file: File) -> Iterator[Words]:
        """Yield the bit patterns of the region in C order, in flat arrays of about BAND_SIZE bytes of the tensor."""
        step = max(1, BAND_SIZE // max(self.matrix.row_size, 1))
        with file.open() as opened:
            for begin in range(0, self.total, step):
                yield self.read(opened, begin, min(begin + step, self.total)).reshape(-1)

    def find_flat(self, begin: int, positions: Indices) -> Indices:
        """Return the flat indices in the tensor of positions in a block whose first row is the region's row `begin`."""
        rows = positions // self.width + begin
        runs = np.searchsorted(self._table[1], rows, "right") - 1
        matrix_rows = self._table[0][runs] + rows - self._table[1][runs]
        flat: Indices = matrix_rows * self.matrix.columns + self.columns.start + positions % self.width
        return flat

    def find_positions(self, begin: int, flat: Indices) -> Indices:
        """Return the positions in a block whose first row is the region's row `begin`; the inverse of `find_flat`.

        The position of a scalar outside the region is -1.
        """
        rows, columns = np.divmod(flat, self.matrix.columns)
        runs = np.searchsorted(self._table[0], rows, "right") - 1
        inside = rows - self._table[0][runs]
        counts = np.diff(self._table[1], append=self.total)[runs]
        good = (runs >= 0) & (inside < counts) & (columns >= self.columns.start) & (columns < self.columns.stop)
        positions = (self._table[1][runs] + inside - begin) * self.width + columns - self.columns.start
        found: Indices = np.where(good, positions, -1)
        return found

    @cached_property
    def _table(self) -> tuple[Indices, Indices]:
        """The first row of each run in the matrix, and in the region."""
        return np.array([first for first, _ in self.runs], np.int64), np.array(self._firsts[:-1], np.int64)
